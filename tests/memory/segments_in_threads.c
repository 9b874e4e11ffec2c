// Many threads that allocate, free, lend, take back and offer at one time, over the stand-in for the driver.
//
// Each writes its own marks into what it got and finds them there, or says what is wrong and ends the program with 1.
// At the end all is given back. Compiled with segments.c, once plainly and once for each sanitizer that the compiler has.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

typedef unsigned long long Address;
enum { GRANULE = 4096, EXTENT = 4 * GRANULE, NUM_THREADS = 8, NUM_SLOTS = 6, TAKEN = -8 };
static const size_t LIMIT = 96 * GRANULE, MEMORY = 400 * GRANULE;
static int num_turns = 2000;

// -- of segments.c ------------------------------------------------------------------------------------------------------

typedef struct {
  uint64_t granule, extent, limit, held, pooled, in_use, leaving, offered, peak_held, peak_in_use;
  uint64_t num_segments, num_leaving, num_pooled, num_offered;
  uint64_t num_mallocs, num_frees, num_failed, num_waits, num_taken;
  uint64_t taken, lent, taken_back, created, released;
} Statistics;
typedef struct { uint64_t number, outcome; } Offer;
enum { KEPT = 1, GIVEN = 2 };
typedef struct { uint64_t address, size, requested, stream, is_leaving, time_us; } Listed;
typedef struct { uint64_t time_us, action, address, size, stream; } Entry;
typedef struct { char call[48], name[64]; int64_t code; uint64_t size, count; } Failure;
void *mball_malloc(ssize_t, int, void *);
void mball_free(void *, ssize_t, int, void *);
int mball_open(int, size_t, size_t), mball_close(int), mball_set_limit(int, size_t), mball_trim(int, size_t, size_t *);
int mball_lend(int, size_t, const Address *, const size_t *);
int mball_take_back(int, size_t, size_t, Address *, size_t *, size_t *);
int mball_offer(int, Address, size_t, Address, void *, Offer *), mball_withdraw(int, Offer *);
size_t mball_taken(int, size_t, uint64_t *), mball_list(int, size_t, Listed *), mball_history(int, size_t, Entry *);
const void *mball_generation(int);
int mball_statistics(int, Statistics *);
void mball_failure(int, Failure *);

// -- of the driver ------------------------------------------------------------------------------------------------------

typedef struct { int type, id; } Location;
typedef struct { int type, handle_types; Location location; void *security; unsigned char flags[8]; } Properties;
typedef struct { Location location; int flags; } Access;
int cuInit(unsigned), cuDevicePrimaryCtxRetain(void **, int), cuDevicePrimaryCtxRelease(int);
int cuCtxPushCurrent(void *), cuCtxPopCurrent(void **);
int cuMemCreate(Address *, size_t, const Properties *, Address), cuMemRelease(Address);
int cuMemAddressReserve(Address *, size_t, size_t, Address, Address), cuMemAddressFree(Address, size_t);
int cuMemMap(Address, size_t, size_t, Address, Address), cuMemUnmap(Address, size_t);
int cuMemSetAccess(Address, size_t, const Access *, size_t);
int cuStreamCreateWithPriority(void **, unsigned, int), cuStreamDestroy(void *);
int cuEventCreate(void **, unsigned), cuEventRecord(void *, void *), cuEventDestroy(void *);
void standin_set(size_t, size_t, int, int, int, int), standin_order(int, unsigned long long), standin_run(void);
size_t standin_taken_bytes(void);
long standin_num_ranges(void), standin_num_retained(void);

static const Properties PLACE = {.type = 1, .location = {1, 0}};
static const Access READ_WRITE = {{1, 0}, 3};

#define EXPECT(condition)                                                                                  \
  do {                                                                                                     \
    if (!(condition)) {                                                                                    \
      Failure failure;                                                                                     \
      mball_failure(0, &failure);                                                                          \
      fprintf(stderr, "line %d: not %s; last: %s %s\n", __LINE__, #condition, failure.call, failure.name); \
      exit(1);                                                                                             \
    }                                                                                                      \
  } while (0)

// -- a thread -----------------------------------------------------------------------------------------------------------

typedef struct { unsigned char *start; size_t size; uint64_t mark; } Slot;
typedef struct {
  uint64_t chance;
  int number;
  void *stream, *event;
  Slot slots[NUM_SLOTS];
  Address range, extent;  // addresses of one extent, and its pages; 0: it was taken
  Offer donor;            // 0: not offered
} Thread;

static void *context;
static void begin(void) { EXPECT(!cuCtxPushCurrent(context)); }
static void end(void) {
  void *popped;
  EXPECT(!cuCtxPopCurrent(&popped));
}

static unsigned draw(Thread *thread, unsigned below) {
  thread->chance ^= thread->chance << 13, thread->chance ^= thread->chance >> 7, thread->chance ^= thread->chance << 17;
  return (unsigned)(thread->chance >> 33) % below;
}
static void fill(const Slot *slot) {
  for (size_t at = 0; at < slot->size; at += GRANULE) {
    uint64_t mark = slot->mark + at;
    memcpy(slot->start + at, &mark, sizeof mark);
    memcpy(slot->start + at + GRANULE - sizeof mark, &mark, sizeof mark);
  }
}
static int holds(const Slot *slot) {
  for (size_t at = 0; at < slot->size; at += GRANULE) {
    uint64_t mark = slot->mark + at;
    if (memcmp(slot->start + at, &mark, sizeof mark) || memcmp(slot->start + at + GRANULE - sizeof mark, &mark, sizeof mark)) return 0;
  }
  return 1;
}
static void allocate_or_free(Thread *thread) {
  Slot *slot = &thread->slots[draw(thread, NUM_SLOTS)];
  if (slot->start) {
    EXPECT(holds(slot));
    mball_free(slot->start, (ssize_t)slot->size, 0, thread->stream);
    slot->start = NULL;
    return;
  }
  size_t asked = 1 + draw(thread, 9 * GRANULE);
  slot->start = mball_malloc((ssize_t)asked, 0, thread->stream);
  if (!slot->start) return;
  slot->size = (asked + GRANULE - 1) / GRANULE * GRANULE;
  slot->mark = (uint64_t)thread->number << 56 | (uint64_t)draw(thread, 1 << 20) << 24;
  fill(slot);
}
static void lend(Thread *thread) {
  Address handle;
  size_t size = draw(thread, 2) ? GRANULE : EXTENT;
  begin();
  int code = cuMemCreate(&handle, size, &PLACE, 0);
  if (!code) EXPECT(!mball_lend(0, 1, &handle, &size));
  end();
}
static void take_back(Thread *thread) {
  Address handles[8];
  size_t sizes[8], count, most = draw(thread, 3 * EXTENT), sum = 0;
  EXPECT(!mball_take_back(0, most, 8, handles, sizes, &count));
  begin();
  for (size_t i = 0; i < count; i++) {
    sum += sizes[i];
    EXPECT(!cuMemRelease(handles[i]));
  }
  end();
  EXPECT(sum <= most);
}
static void offer_or_withdraw(Thread *thread) {
  Slot slot = {(unsigned char *)(uintptr_t)thread->range, EXTENT, ~(uint64_t)thread->number << 32};
  begin();
  if (thread->donor.number) {
    int code = mball_withdraw(0, &thread->donor);
    thread->donor.number = 0;
    EXPECT(thread->donor.outcome == (code == TAKEN ? GIVEN : KEPT) && (!code || code == TAKEN));
    if (code == TAKEN) thread->extent = 0;
    else EXPECT(holds(&slot));
  } else if (!thread->extent) {
    if (!cuMemCreate(&thread->extent, EXTENT, &PLACE, 0)) {
      EXPECT(!cuMemMap(thread->range, EXTENT, 0, thread->extent, 0));
      EXPECT(!cuMemSetAccess(thread->range, EXTENT, &READ_WRITE, 1));
    } else thread->extent = 0;
  } else {
    fill(&slot);
    EXPECT(!cuEventRecord(thread->event, thread->stream));
    EXPECT(!mball_offer(0, thread->range, EXTENT, thread->extent, thread->event, &thread->donor));
  }
  end();
}
static void look(Thread *thread) {
  static const uint64_t MOST = 1 << 20;
  Statistics now;
  Listed listed[512];
  Entry history[64];
  uint64_t ids[64];
  size_t released;
  EXPECT(!mball_statistics(0, &now));
  EXPECT(now.held == now.pooled + now.in_use + now.leaving && now.held <= now.limit);
  size_t count = mball_list(0, 512, listed);
  for (size_t i = 0; i < count; i++)
    for (size_t j = 0; j < i; j++)
      EXPECT(listed[i].address >= listed[j].address + listed[j].size || listed[j].address >= listed[i].address + listed[i].size);
  EXPECT(mball_history(0, 64, history) <= 64);
  EXPECT(mball_taken(0, 64, ids) <= NUM_THREADS);
  EXPECT(__atomic_load_n((const uint64_t *)mball_generation(0), __ATOMIC_RELAXED) < MOST);
  EXPECT(!mball_trim(0, draw(thread, 2) * EXTENT, &released));
  mball_set_limit(0, LIMIT - draw(thread, 8) * GRANULE);  // it may be busy
}
static void *run(void *of_thread) {
  Thread *thread = of_thread;
  for (int turn = 0; turn < num_turns; turn++) {
    unsigned chosen = draw(thread, 40);
    if (chosen < 30) allocate_or_free(thread);
    else if (chosen < 33) lend(thread);
    else if (chosen < 36) take_back(thread);
    else if (chosen < 39) offer_or_withdraw(thread);
    else look(thread);
  }
  for (int i = 0; i < NUM_SLOTS; i++)
    if (thread->slots[i].start) {
      EXPECT(holds(&thread->slots[i]));
      mball_free(thread->slots[i].start, 0, 0, thread->stream);
    }
  if (thread->donor.number) offer_or_withdraw(thread);
  return NULL;
}

int main(int argc, char **argv) {
  if (argc > 1) num_turns = atoi(argv[1]);
  static Thread threads[NUM_THREADS];
  pthread_t started[NUM_THREADS];
  standin_set(GRANULE, MEMORY, 1, 1, 1, 1);
  standin_order(2, 1);  // work of streams runs by chance
  EXPECT(!cuInit(0));
  EXPECT(!mball_open(0, LIMIT, EXTENT));
  EXPECT(!cuDevicePrimaryCtxRetain(&context, 0));
  begin();
  for (int i = 0; i < NUM_THREADS; i++) {
    threads[i].number = i + 1, threads[i].chance = 88172645463325252u + (uint64_t)i * 2654435761u;
    EXPECT(!cuStreamCreateWithPriority(&threads[i].stream, 1, 0));
    EXPECT(!cuEventCreate(&threads[i].event, 2));
    EXPECT(!cuMemAddressReserve(&threads[i].range, EXTENT, EXTENT, 0, 0));
  }
  for (int i = 0; i < NUM_THREADS; i++) EXPECT(!pthread_create(&started[i], NULL, run, &threads[i]));
  for (int i = 0; i < NUM_THREADS; i++) EXPECT(!pthread_join(started[i], NULL));
  Statistics now;
  EXPECT(!mball_statistics(0, &now));
  EXPECT(!mball_close(0));
  for (int i = 0; i < NUM_THREADS; i++) {
    if (threads[i].extent) {
      EXPECT(!cuMemUnmap(threads[i].range, EXTENT));
      EXPECT(!cuMemRelease(threads[i].extent));
    }
    EXPECT(!cuMemAddressFree(threads[i].range, EXTENT));
    EXPECT(!cuEventDestroy(threads[i].event));
    EXPECT(!cuStreamDestroy(threads[i].stream));
  }
  end();
  EXPECT(!cuDevicePrimaryCtxRelease(0));
  EXPECT(!standin_taken_bytes() && !standin_num_ranges() && !standin_num_retained());
  // What the test wants to have been met with.
  printf("%llu %llu %llu %llu %llu\n", (unsigned long long)now.num_mallocs, (unsigned long long)now.num_failed,
         (unsigned long long)now.num_taken, (unsigned long long)now.lent, (unsigned long long)now.taken_back);
  return 0;
}
