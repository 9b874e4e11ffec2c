// cuFile over the stand-in: a file is read into memory of the device, which is the host's, straight where the settings
// say so. A part of standin.c, so failures are set and calls are counted as there; a read that fails with a code below
// 1000 fails with that errno.
#include <fcntl.h>
#include <sys/types.h>

typedef struct { int code, cuda; } FileError;
typedef struct { int type; union { int fd; void *pointer; } handle; const void *operations; } Description;
typedef struct {
  struct { unsigned major, minor; size_t poll_threshold, most_direct; unsigned status, control; } nvfs;
  unsigned features, most_cache, cache_each, most_pinned, most_batch, batch_timeout;
} DriverProperties;

enum {
  DRIVER_NOT_INITIALIZED = 5001, CUDA_DRIVER_ERROR = 5011, FILE_CONTEXT_MISMATCH = 5015, MAPPING_RANGE = 5017,
  FILE_OPEN_FLAG = 5019, FILE_INVALID_VALUE = 5022, MEMORY_NOT_REGISTERED = 5024, DRIVER_ALREADY_OPEN = 5026,
  HANDLE_NOT_REGISTERED = 5027, INTERNAL_ERROR = 5030,
  ALLOW_COMPAT_PARAMETER = 1, COMPAT_FLAG = 2,
};

typedef struct FileHandle { int fd; struct FileHandle *next; } FileHandle;
typedef struct Opened { Address address; size_t size; struct Opened *next; } Opened;
static FileHandle *file_handles;
static Opened *opened;  // memory of the device that is open to disks
static int compat = 1, forced, straight = 1, num_open;  // straight: whether there is nvidia-fs; forced: by cufile.json
static size_t most_at_once;                             // a read brings no more than this, if it is not 0
static long num_reading, most_reading, num_compat_reads, num_late;  // late: files that were closed before they were given up
static int holding;
static pthread_cond_t let_go_on = PTHREAD_COND_INITIALIZER;

static void sweep_files(void) {
  while (file_handles) { FileHandle *gone = file_handles; file_handles = gone->next; free(gone); }
  while (opened) { Opened *gone = opened; opened = gone->next; free(gone); }
  num_open = 0, compat = 1, num_late = 0;
}
static int is_opened(Address address) {  // which memory may not be freed
  for (Opened *o = opened; o; o = o->next) if (o->address == address) return 1;
  return 0;
}

void standin_sweep_files(void) { pthread_mutex_lock(&mutex); sweep_files(); pthread_mutex_unlock(&mutex); }
void standin_files(int is_straight, int is_forced, size_t most) {
  pthread_mutex_lock(&mutex);
  straight = is_straight, forced = is_forced, most_at_once = most;
  most_reading = num_compat_reads = 0;
  pthread_mutex_unlock(&mutex);
}
// While it holds, reads do not come back.
void standin_hold_reads(int is_held) {
  pthread_mutex_lock(&mutex);
  holding = is_held;
  pthread_cond_broadcast(&let_go_on);
  pthread_mutex_unlock(&mutex);
}
long standin_num_file_handles(void) { long n = 0; for (FileHandle *h = file_handles; h; h = h->next) n++; return n; }
size_t standin_opened_bytes(void) { size_t sum = 0; for (Opened *o = opened; o; o = o->next) sum += o->size; return sum; }
long standin_num_late(void) { return num_late; }
long standin_num_open(void) { return num_open; }
long standin_most_reading(void) { return most_reading; }
long standin_num_reading(void) { return num_reading; }
long standin_num_compat_reads(void) { return num_compat_reads; }
int standin_falls_back(void) { return compat; }

#define FILE_CALL                                                                     \
  __attribute__((cleanup(unlock))) int held = (pthread_mutex_lock(&mutex), 1);        \
  (void)held;                                                                         \
  do { Result failed = enter(__func__); if (failed) return (FileError){failed < 1000 ? INTERNAL_ERROR : failed, 0}; } while (0)
#define FILE_REQUIRE(condition, code) do { if (!(condition)) return (FileError){(code), 0}; } while (0)
static const FileError DONE = {0, 0};

FileError cuFileGetVersion(int *version) { *version = 1200; return DONE; }
FileError cuFileDriverGetProperties(DriverProperties *properties) {
  FILE_CALL;
  memset(properties, 0, sizeof *properties);
  int through_host = compat || (num_open && forced);
  properties->nvfs.control = through_host ? COMPAT_FLAG : 0;
  return DONE;
}
FileError cuFileSetParameterBool(int parameter, _Bool value) {
  FILE_CALL;
  FILE_REQUIRE(!num_open, DRIVER_ALREADY_OPEN);
  FILE_REQUIRE(parameter == ALLOW_COMPAT_PARAMETER, FILE_INVALID_VALUE);
  compat = value;
  return DONE;
}
FileError cuFileDriverOpen(void) {
  FILE_CALL;
  FILE_REQUIRE(straight || compat, DRIVER_NOT_INITIALIZED);
  num_open++;
  return DONE;
}
FileError cuFileDriverClose_v2(void) {
  FILE_CALL;
  // Stricter than cuFile, which lets go of all by itself.
  FILE_REQUIRE(num_open && !file_handles && !opened, FILE_INVALID_VALUE);
  num_open--;
  return DONE;
}
FileError cuFileDriverClose(void) { return cuFileDriverClose_v2(); }

FileError cuFileHandleRegister(void **handle, Description *description) {
  FILE_CALL;
  FILE_REQUIRE(num_open, DRIVER_NOT_INITIALIZED);
  FILE_REQUIRE(description->type == 1, FILE_INVALID_VALUE);
  int flags = fcntl(description->handle.fd, F_GETFL);
  FILE_REQUIRE(flags >= 0 && flags & O_DIRECT, FILE_OPEN_FLAG);
  FileHandle *made = malloc(sizeof *made);
  made->fd = description->handle.fd, made->next = file_handles, file_handles = made;
  *handle = made;
  return DONE;
}
void cuFileHandleDeregister(void *handle) {
  pthread_mutex_lock(&mutex);
  enter("cuFileHandleDeregister");
  for (FileHandle **at = &file_handles; *at; at = &(*at)->next)
    if (*at == handle) {
      FileHandle *gone = *at;
      num_late += fcntl(gone->fd, F_GETFD) < 0;
      *at = gone->next;
      free(gone);
      break;
    }
  pthread_mutex_unlock(&mutex);
}
FileError cuFileBufRegister(const void *address, size_t size, int flags) {
  FILE_CALL;
  FILE_REQUIRE(num_open, DRIVER_NOT_INITIALIZED);
  FILE_REQUIRE(num_contexts && contexts[num_contexts - 1], FILE_CONTEXT_MISMATCH);
  Range **plain = find_range((Address)(uintptr_t)address, 1);
  FILE_REQUIRE(!flags && *plain && size <= (*plain)->size, FILE_INVALID_VALUE);
  Opened *made = malloc(sizeof *made);
  made->address = (Address)(uintptr_t)address, made->size = size, made->next = opened, opened = made;
  return DONE;
}
FileError cuFileBufDeregister(const void *address) {
  FILE_CALL;
  FILE_REQUIRE(!num_reading, FILE_INVALID_VALUE);
  Opened **at = &opened;
  while (*at && (*at)->address != (Address)(uintptr_t)address) at = &(*at)->next;
  Opened *found = *at;
  FILE_REQUIRE(found, MEMORY_NOT_REGISTERED);
  *at = found->next;
  free(found);
  return DONE;
}

static ssize_t refused(int code) {
  if (code < 1000) { errno = code; return -1; }
  return -code;
}

ssize_t cuFileRead(void *handle, void *address, size_t size, off_t offset, off_t shift) {
  pthread_mutex_lock(&mutex);
  int failed = enter(__func__);
  if (!failed && lost) failed = CUDA_DRIVER_ERROR;
  if (!failed && !num_open) failed = DRIVER_NOT_INITIALIZED;
  if (!failed && !(num_contexts && contexts[num_contexts - 1])) failed = FILE_CONTEXT_MISMATCH;
  FileHandle *file = file_handles;
  while (file && file != handle) file = file->next;
  if (!failed && !file) failed = HANDLE_NOT_REGISTERED;
  Opened *memory = opened;
  while (memory && memory->address != (Address)(uintptr_t)address) memory = memory->next;
  if (!failed && !memory) failed = MEMORY_NOT_REGISTERED;
  if (!failed && (shift < 0 || shift + size > memory->size)) failed = MAPPING_RANGE;
  num_compat_reads += compat;
  int fd = file ? file->fd : -1;
  if (++num_reading > most_reading) most_reading = num_reading;
  while (holding) pthread_cond_wait(&let_go_on, &mutex);
  pthread_mutex_unlock(&mutex);

  // A read that fails may have written something before.
  char *to = (char *)address + shift;
  ssize_t there = -1;
  if (failed) {
    if (memory && shift >= 0 && shift + size <= memory->size) memset(to, 0xEE, size);
  } else {
    there = pread(fd, to, size, offset);
    if (there < 0) failed = errno;
    if (most_at_once && there > (ssize_t)most_at_once) {
      memset(to + most_at_once, 0xEE, there - most_at_once);
      there = most_at_once;
    }
  }
  pthread_mutex_lock(&mutex);
  num_reading--;
  pthread_mutex_unlock(&mutex);
  return failed ? refused(failed) : there;
}
// Nobody here writes around the host, but a torch that was built for CUDA is not loaded without it.
ssize_t cuFileWrite(void *handle, const void *address, size_t size, off_t offset, off_t shift) {
  (void)handle, (void)address, (void)size, (void)offset, (void)shift;
  return refused(INTERNAL_ERROR);
}
const char *cufileop_status_error(int code) { (void)code; return "as the test said"; }
