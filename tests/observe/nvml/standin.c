// A stand-in for NVML, the driver's library for telemetry: libnvidia-ml.so.1 with what mball asks, for machines without
// a GPU. pynvml's own code runs against it. Every answer can be set and every call can be made to fail, by functions named
// standin_* or, for a process that is started, by MBALL_NVML ("set total 0 1024;fail nvmlInitWithFlags 9").
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef int Result;
typedef unsigned long long Bytes;
typedef struct { unsigned number; } Unit;  // a GPU, or a slice of one; a handle points to it
typedef Unit *Device;

enum {
  SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
  MAX_GPUS = 8, MAX_SLICES = 7, UNSIGNED_LONG_LONG = 3, NVLINK_SENT = 138, NVLINK_RECEIVED = 139, MEMORY_V2 = 0x02000028,
};

typedef struct { char name[32]; unsigned unit; Bytes value; } Setting;
typedef struct { char name[32]; unsigned unit; char text[64]; } Text;
typedef struct { char name[64]; long first, last, seen; int code; } Rule;
typedef struct { char list[16]; unsigned unit, pid; Bytes bytes; } Listed;

static Setting settings[256];
static Text texts[64];
static Rule rules[16];
static Listed listed[64];
static int num_settings, num_texts, num_rules, num_listed, num_open;
static long num_calls;
static char last_calls[512][64];
static Unit units[MAX_GPUS * (1 + MAX_SLICES)];  // GPU i is unit i; its slice j is unit MAX_GPUS + i * MAX_SLICES + j

// -- the tests' side ----------------------------------------------------------------------------------------------------

void standin_set(const char *name, unsigned unit, Bytes value) {
  int i;
  for (i = 0; i < num_settings && (strcmp(settings[i].name, name) || settings[i].unit != unit); i++) {}
  if (i == 256) abort();
  if (i == num_settings) num_settings++;
  snprintf(settings[i].name, sizeof settings[i].name, "%s", name);
  settings[i].unit = unit, settings[i].value = value;
}
void standin_text(const char *name, unsigned unit, const char *text) {
  int i;
  for (i = 0; i < num_texts && (strcmp(texts[i].name, name) || texts[i].unit != unit); i++) {}
  if (i == 64) abort();
  if (i == num_texts) num_texts++;
  snprintf(texts[i].name, sizeof texts[i].name, "%s", name);
  texts[i].unit = unit;
  snprintf(texts[i].text, sizeof texts[i].text, "%s", text);
}
// Lists a process ("compute", "graphics" or "mps").
void standin_list(const char *list, unsigned unit, unsigned pid, Bytes bytes) {
  if (num_listed == 64) abort();
  Listed *entry = &listed[num_listed++];
  snprintf(entry->list, sizeof entry->list, "%s", list);
  entry->unit = unit, entry->pid = pid, entry->bytes = bytes;
}
// Fails calls number `first` to `last` from now on, of this name ("" for any), with `code`.
void standin_fail(const char *name, long first, long last, int code) {
  if (num_rules == 16) abort();
  Rule *rule = &rules[num_rules++];
  snprintf(rule->name, sizeof rule->name, "%s", name);
  rule->first = first, rule->last = last, rule->seen = 0, rule->code = code;
}
void standin_forget(void) { num_settings = num_texts = num_rules = num_listed = 0; num_calls = 0; }
void standin_forget_failures(void) { num_rules = 0; num_calls = 0; }
long standin_num_calls(void) { return num_calls; }
const char *standin_call(long number) { return last_calls[number % 512]; }
int standin_num_open(void) { return num_open; }

__attribute__((constructor)) static void from_environment(void) {
  const char *variable = getenv("MBALL_NVML");
  if (!variable) return;
  char *commands = strdup(variable), *rest = commands, *command;
  while ((command = strtok_r(rest, ";", &rest))) {
    char name[64];
    unsigned unit, pid;
    Bytes value;
    int code;
    if (sscanf(command, "set %63s %u %llu", name, &unit, &value) == 3) standin_set(name, unit, value);
    else if (sscanf(command, "fail %63s %d", name, &code) == 2) standin_fail(name, 1, 1L << 40, code);
    else if (sscanf(command, "list %63s %u %u %llu", name, &unit, &pid, &value) == 4) standin_list(name, unit, pid, value);
    else { fprintf(stderr, "MBALL_NVML: cannot read %s\n", command); abort(); }
  }
  free(commands);
}

// -- answers ------------------------------------------------------------------------------------------------------------

static Bytes value(const char *name, unsigned unit, Bytes otherwise) {
  for (int i = 0; i < num_settings; i++)
    if (!strcmp(settings[i].name, name) && settings[i].unit == unit) return settings[i].value;
  return otherwise;
}
static const char *text(const char *name, unsigned unit) {
  for (int i = 0; i < num_texts; i++)
    if (!strcmp(texts[i].name, name) && texts[i].unit == unit) return texts[i].text;
  return NULL;
}
static Result enter(const char *name) {
  Result failed = SUCCESS;
  snprintf(last_calls[num_calls++ % 512], 64, "%s", name);
  for (int i = 0; i < num_rules; i++) {
    Rule *rule = &rules[i];
    if (rule->name[0] && strcmp(rule->name, name)) continue;
    long seen = ++rule->seen;
    if (!failed && rule->first <= seen && seen <= rule->last) failed = rule->code;
  }
  return failed;
}
#define REQUIRE(condition, code) do { if (!(condition)) return (code); } while (0)
#define CALL do { Result failed = enter(__func__); if (failed) return failed; } while (0)
#define OPEN CALL; REQUIRE(num_open, UNINITIALIZED)
#define NUM_GPUS ((unsigned)value("num_gpus", 0, 1))
static int is_slice(Device device) { return device->number >= MAX_GPUS; }
static int is_known(Device device) { return device >= units && device < units + MAX_GPUS * (1 + MAX_SLICES); }
#define DEVICE OPEN; REQUIRE(is_known(device), INVALID_ARGUMENT)

Result nvmlInitWithFlags(unsigned flags) {
  CALL;
  REQUIRE(!flags, INVALID_ARGUMENT);
  for (unsigned i = 0; i < MAX_GPUS * (1 + MAX_SLICES); i++) units[i].number = i;
  num_open++;
  return SUCCESS;
}
Result nvmlShutdown(void) { OPEN; num_open--; return SUCCESS; }
const char *nvmlErrorString(Result code) { return code == 4711 ? "An Error of Tomorrow" : "An Error"; }
Result nvmlSystemGetDriverVersion(char *version, unsigned size) { OPEN; snprintf(version, size, "580.65.06"); return SUCCESS; }
Result nvmlSystemGetCudaDriverVersion(int *version) { OPEN; *version = 13010; return SUCCESS; }
Result nvmlSystemGetProcessName(unsigned pid, char *name, unsigned size) {
  OPEN;
  const char *known = text("process", pid);
  REQUIRE(known, NOT_FOUND);
  snprintf(name, size, "%s", known);
  return SUCCESS;
}
Result nvmlDeviceGetCount_v2(unsigned *count) { OPEN; *count = NUM_GPUS; return SUCCESS; }
Result nvmlDeviceGetHandleByIndex_v2(unsigned index, Device *device) {
  OPEN;
  REQUIRE(index < NUM_GPUS, INVALID_ARGUMENT);
  *device = &units[index];
  return SUCCESS;
}
Result nvmlDeviceGetName(Device device, char *name, unsigned size) {
  DEVICE;
  const char *set = text("name", device->number);
  snprintf(name, size, "%s", set ? set : is_slice(device) ? "stand-in slice" : "stand-in");
  return SUCCESS;
}
Result nvmlDeviceGetUUID(Device device, char *uuid, unsigned size) {
  DEVICE;
  snprintf(uuid, size, "%s-00000000-0000-0000-0000-%012u", is_slice(device) ? "MIG" : "GPU", device->number);
  return SUCCESS;
}

typedef struct { Bytes total, free, used; } Memory;
typedef struct { unsigned version; Bytes total, reserved, free, used; } MemoryV2;

static void fill(Device device, Bytes *total, Bytes *reserved, Bytes *used) {
  *total = value("total", device->number, 80ull << 30);
  *reserved = value("reserved", device->number, 1ull << 29);
  *used = value("used", device->number, 0);
}
Result nvmlDeviceGetMemoryInfo(Device device, Memory *memory) {  // what is reserved counts as used here
  DEVICE;
  Bytes reserved;
  fill(device, &memory->total, &reserved, &memory->used);
  memory->used += reserved;
  memory->free = memory->total - memory->used;
  return SUCCESS;
}
Result nvmlDeviceGetMemoryInfo_v2(Device device, MemoryV2 *memory) {
  DEVICE;
  REQUIRE(memory->version == MEMORY_V2, 25);
  fill(device, &memory->total, &memory->reserved, &memory->used);
  memory->free = memory->total - memory->used - memory->reserved;
  return SUCCESS;
}

typedef struct { unsigned gpu, memory; } Utilization;

Result nvmlDeviceGetUtilizationRates(Device device, Utilization *rates) {
  DEVICE;
  REQUIRE(!is_slice(device), NOT_SUPPORTED);
  rates->gpu = value("busy", device->number, 0), rates->memory = value("memory_busy", device->number, 0);
  return SUCCESS;
}
Result nvmlDeviceGetMaxPcieLinkGeneration(Device device, unsigned *generation) {
  DEVICE;
  *generation = value("generation", device->number, 5);
  return SUCCESS;
}
Result nvmlDeviceGetMaxPcieLinkWidth(Device device, unsigned *width) {
  DEVICE;
  *width = value("lanes", device->number, 16);
  return SUCCESS;
}
Result nvmlDeviceGetPcieThroughput(Device device, int counter, unsigned *kb_per_s) {
  DEVICE;
  REQUIRE(!is_slice(device), NOT_SUPPORTED);
  REQUIRE(counter == 0 || counter == 1, INVALID_ARGUMENT);
  nanosleep(&(struct timespec){.tv_nsec = value("pcie_wait_ms", 0, 0) * 1000000}, NULL);
  *kb_per_s = value(counter ? "pcie_received" : "pcie_sent", device->number, 0);
  return SUCCESS;
}

typedef struct { unsigned field, scope; int64_t at, latency; int type; Result result; Bytes value; } Field;

Result nvmlDeviceGetFieldValues(Device device, int count, Field *fields) {
  DEVICE;
  for (Field *field = fields; field < fields + count; field++) {
    const char *name = field->field == NVLINK_SENT ? "nvlink_sent" : field->field == NVLINK_RECEIVED ? "nvlink_received" : "";
    Bytes none = ~0ull, counter = *name ? value(name, device->number, none) : none;
    field->result = counter == none ? value("nvlink_error", device->number, NOT_SUPPORTED) : SUCCESS;
    field->type = value("nvlink_type", device->number, UNSIGNED_LONG_LONG);
    if (field->scope != 0xffffffffu) counter /= 18;  // one of the links, and not their sum
    if (!field->result) field->value = counter;
  }
  return SUCCESS;
}

// -- processes ----------------------------------------------------------------------------------------------------------

typedef struct { unsigned pid; Bytes bytes; unsigned gpu_instance, compute_instance; } Process;

static Result processes(Device device, const char *list, unsigned *count, Process *into) {
  unsigned found = 0;
  for (int i = 0; i < num_listed; i++) {
    if (strcmp(listed[i].list, list) || listed[i].unit != device->number) continue;
    if (into && found < *count) into[found] = (Process){listed[i].pid, listed[i].bytes, ~0u, ~0u};
    found++;
  }
  int fits = found <= *count;
  *count = found;
  return fits ? SUCCESS : INSUFFICIENT_SIZE;
}
Result nvmlDeviceGetComputeRunningProcesses_v3(Device device, unsigned *count, Process *into) {
  DEVICE;
  return processes(device, "compute", count, into);
}
Result nvmlDeviceGetGraphicsRunningProcesses_v3(Device device, unsigned *count, Process *into) {
  DEVICE;
  return processes(device, "graphics", count, into);
}
Result nvmlDeviceGetMPSComputeRunningProcesses_v3(Device device, unsigned *count, Process *into) {
  DEVICE;
  return processes(device, "mps", count, into);
}

// -- slices -------------------------------------------------------------------------------------------------------------

Result nvmlDeviceGetMigMode(Device device, unsigned *current, unsigned *pending) {
  DEVICE;
  REQUIRE(!is_slice(device) && value("can_slice", device->number, 1), NOT_SUPPORTED);
  *current = *pending = value("slices", device->number, 0) != 0;
  return SUCCESS;
}
Result nvmlDeviceGetMaxMigDeviceCount(Device device, unsigned *count) { DEVICE; *count = MAX_SLICES; return SUCCESS; }
Result nvmlDeviceGetMigDeviceHandleByIndex(Device device, unsigned index, Device *slice) {
  DEVICE;
  REQUIRE(!is_slice(device) && index < MAX_SLICES, INVALID_ARGUMENT);
  REQUIRE(value("slices", device->number, 0) >> index & 1, NOT_FOUND);  // a bit a slice
  *slice = &units[MAX_GPUS + device->number * MAX_SLICES + index];
  return SUCCESS;
}
