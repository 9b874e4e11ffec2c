// Threads that read chunks of files into memory, without Python: submit and complete go on while Python is busy.
//
// Plain C and POSIX threads. Python uses it through ctypes, by the same functions that the tests in C call.
//
// [Note: memory] Everything that is used here belongs to the caller: the pool, a request, its chunks, the memory that
// they fill, and the descriptors. A request and what it names must stay until it is over (`mball_request_over`), a pool
// until `mball_pool_ended` says so. So nothing is allocated here, and nothing can be left behind.
//
// [Note: waiting] Who waits does so for a while at most and is told whether it is over, so that a caller can look after
// its signals in between. Threads of a pool block all signals: those are for the caller's threads.
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

// Of this file, by whoever compiles it: so a library that was compiled before it was changed is not used.
#ifndef SOURCE_DIGEST
#define SOURCE_DIGEST "unknown"
#endif

enum { MOST_THREADS = 64, FILE_ENDED = -1, CLOSED = -2, NR_CACHESTAT = 451 };

typedef struct {
  int32_t buffered, direct;  // descriptors, through the page cache and past it; `direct` is -1 for chunks that may not
  int64_t offset;            // in the file
  char *address;
  uint64_t size;       // bytes of room at `address`
  uint64_t required;   // bytes to bring at least; a file may end there
  uint64_t alignment;  // of what may go past the page cache
  uint64_t may_be_cached;  // whether it goes through the page cache if that has all of it
} Chunk;

// Under the pool's mutex, but for `remaining`, which anybody may look at.
typedef struct Request {
  struct Request *next;
  const Chunk *chunks;
  uint32_t num_chunks, num_begun;
  _Atomic uint32_t remaining;  // chunks that are not over
  int32_t error;               // of the first chunk that failed: an errno, FILE_ENDED or CLOSED; else 0
  uint32_t failed;             // that chunk
  uint32_t refused;            // 1 + the chunk that was refused past the page cache (EINVAL) last; else 0
  uint64_t done;               // bytes of the failed chunk that had come
  int64_t began_ns, ended_ns;  // by CLOCK_MONOTONIC; 0 before
} Request;

typedef struct {
  uint64_t size, direct, num_requests;
  int64_t busy_ns;
} Statistics;

typedef struct {
  pthread_mutex_t mutex;
  pthread_cond_t ready;  // there is a chunk to begin, or the end
  pthread_cond_t over;   // a request is over, or a thread
  Request *first, *last; // those with chunks that were not begun
  int32_t pid;  // of the process that has the threads, 0 before there are any
  uint32_t num_threads, num_active, stopping;
  int64_t busy_since_ns;
  Statistics statistics;
  pthread_t threads[MOST_THREADS];
} Pool;

typedef ssize_t (*ReadFunction)(int, const struct iovec *, int, off_t);

// Tests put failing ones here.
static _Atomic(ReadFunction) read_function = preadv;

EXPORT const char *mball_source(void) { return SOURCE_DIGEST; }

EXPORT void mball_read_by(ReadFunction function) { read_function = function ? function : preadv; }

static int64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

typedef struct {
  uint64_t done, direct, num_requests;
  int error, is_refused;
} Outcome;

// Whether the page cache has all of a chunk; not where the kernel does not tell (before Linux 6.5).
static int is_cached(const Chunk *chunk) {
  struct { uint64_t offset, size; } part = {(uint64_t)chunk->offset, chunk->required};
  struct { uint64_t cached, dirty, under_writeback, evicted, recently_evicted; } pages;
  if (syscall(NR_CACHESTAT, (unsigned)chunk->buffered, &part, &pages, 0u)) return 0;
  return pages.cached * (uint64_t)sysconf(_SC_PAGESIZE) >= chunk->required;
}

static Outcome read_chunk(const Chunk *chunk) {
  Outcome outcome = {0};
  int may_pass = chunk->direct >= 0 && !(chunk->may_be_cached && is_cached(chunk));
  while (outcome.done < chunk->required) {
    // After a short read at an odd place only the page cache can go on.
    int past_cache = may_pass && !outcome.is_refused && outcome.done % chunk->alignment == 0;
    struct iovec rest = {chunk->address + outcome.done, chunk->size - outcome.done};
    ReadFunction function = atomic_load(&read_function);
    ssize_t got = function(past_cache ? chunk->direct : chunk->buffered, &rest, 1, chunk->offset + (off_t)outcome.done);
    int error = errno;
    if (got < 0 && error == EINTR) continue;
    ++outcome.num_requests;
    if (got < 0 && past_cache && error == EINVAL) {
      outcome.is_refused = 1;
    } else if (got < 0) {
      outcome.error = error;
      break;
    } else if (got == 0) {
      outcome.error = FILE_ENDED;
      break;
    } else {
      outcome.done += (uint64_t)got;
      if (past_cache) outcome.direct += (uint64_t)got;
    }
  }
  return outcome;
}

// Counts chunks of a request as over. With the mutex: the request may be gone as soon as it is let go.
static void finish(Pool *pool, Request *request, uint32_t num_chunks) {
  uint32_t remaining = atomic_load_explicit(&request->remaining, memory_order_relaxed) - num_chunks;
  if (!remaining) {
    request->ended_ns = now_ns();
    pthread_cond_broadcast(&pool->over);
  }
  atomic_store_explicit(&request->remaining, remaining, memory_order_release);
}

static void fail(Request *request, uint32_t chunk, int error, uint64_t done) {
  if (request->error) return;
  request->error = error;
  request->failed = chunk;
  request->done = done;
}

// Takes the first request out of the queue, its chunks being begun.
static void dequeue(Pool *pool) {
  pool->first = pool->first->next;
  if (!pool->first) pool->last = NULL;
}

static void read_next(Pool *pool) {
  Request *request = pool->first;
  uint32_t number = request->num_begun++;
  const Chunk *chunk = &request->chunks[number];
  if (request->num_begun == request->num_chunks) dequeue(pool);
  int64_t began_ns = now_ns();
  if (!pool->num_active++) pool->busy_since_ns = began_ns;
  if (!request->began_ns) request->began_ns = began_ns;
  Outcome outcome = {0};
  // One failed chunk fails the request: reading its other chunks would be wasted.
  int is_wanted = !request->error;
  if (is_wanted) {
    pthread_mutex_unlock(&pool->mutex);
    outcome = read_chunk(chunk);
    pthread_mutex_lock(&pool->mutex);
  }
  Statistics *sum = &pool->statistics;
  sum->num_requests += outcome.num_requests;
  if (is_wanted && !outcome.error) {
    sum->size += chunk->required;
    sum->direct += outcome.direct < chunk->required ? outcome.direct : chunk->required;
  }
  if (!--pool->num_active) sum->busy_ns += now_ns() - pool->busy_since_ns;
  if (outcome.is_refused) request->refused = number + 1;
  if (outcome.error) fail(request, number, outcome.error, outcome.done);
  finish(pool, request, 1);
}

static void *work(void *argument) {
  Pool *pool = argument;
  pthread_mutex_lock(&pool->mutex);
  for (;;) {
    while (!pool->first && !pool->stopping) pthread_cond_wait(&pool->ready, &pool->mutex);
    if (pool->stopping) break;
    read_next(pool);
  }
  pthread_mutex_unlock(&pool->mutex);
  return NULL;
}

EXPORT uint64_t mball_pool_size(void) { return sizeof(Pool); }

EXPORT int32_t mball_pool_pid(const Pool *pool) { return pool->pid; }

// Starts the threads of a pool, in memory of zeros, if that was not done. Returns 0, or the errno of why fewer could be
// started; what there is then has to be stopped.
EXPORT int mball_pool_start(Pool *pool, uint32_t num_threads) {
  if (pool->pid) return 0;
  pool->pid = getpid();
  pthread_condattr_t monotonic;
  pthread_condattr_init(&monotonic);
  pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
  pthread_mutex_init(&pool->mutex, NULL);
  pthread_cond_init(&pool->ready, NULL);
  pthread_cond_init(&pool->over, &monotonic);
  pthread_condattr_destroy(&monotonic);
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int error = num_threads > MOST_THREADS ? EINVAL : 0;
  while (!error && pool->num_threads < num_threads) {
    error = pthread_create(&pool->threads[pool->num_threads], NULL, work, pool);
    if (!error) ++pool->num_threads;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  return error;
}

// Queues a request of one chunk or more. Returns 0, or CLOSED, and then nothing of it is begun.
EXPORT int mball_pool_submit(Pool *pool, Request *request) {
  pthread_mutex_lock(&pool->mutex);
  int code = pool->stopping ? CLOSED : 0;
  if (!code) {
    request->next = NULL;
    atomic_store_explicit(&request->remaining, request->num_chunks, memory_order_relaxed);
    if (pool->last) {
      pool->last->next = request;
    } else {
      pool->first = request;
    }
    pool->last = request;
    if (request->num_chunks == 1) {
      pthread_cond_signal(&pool->ready);
    } else {
      pthread_cond_broadcast(&pool->ready);
    }
  }
  pthread_mutex_unlock(&pool->mutex);
  return code;
}

// Whether nothing of a request is under way: it is over, or was never submitted (and came with zeros).
EXPORT int mball_request_over(const Request *request) {
  return !atomic_load_explicit(&request->remaining, memory_order_acquire);
}

// Waits with the mutex for the condition `over`; returns whether there was time left.
static int wait_until(Pool *pool, int64_t deadline_ns) {
  struct timespec until = {deadline_ns / INT64_C(1000000000), deadline_ns % INT64_C(1000000000)};
  return pthread_cond_timedwait(&pool->over, &pool->mutex, &until) != ETIMEDOUT;
}

// Blocks for `most_ns` at most until a request is over; returns whether it is.
EXPORT int mball_request_wait(Pool *pool, const Request *request, int64_t most_ns) {
  int64_t deadline_ns = now_ns() + most_ns;
  pthread_mutex_lock(&pool->mutex);
  while (!mball_request_over(request) && wait_until(pool, deadline_ns)) {}
  pthread_mutex_unlock(&pool->mutex);
  return mball_request_over(request);
}

// Blocks for `most_ns` at most until every request is over; returns whether they are.
EXPORT int mball_pool_drain(Pool *pool, int64_t most_ns) {
  int64_t deadline_ns = now_ns() + most_ns;
  pthread_mutex_lock(&pool->mutex);
  while ((pool->first || pool->num_active) && wait_until(pool, deadline_ns)) {}
  int is_idle = !pool->first && !pool->num_active;
  pthread_mutex_unlock(&pool->mutex);
  return is_idle;
}

EXPORT void mball_pool_statistics(Pool *pool, Statistics *statistics) {
  pthread_mutex_lock(&pool->mutex);
  *statistics = pool->statistics;
  if (pool->num_active) statistics->busy_ns += now_ns() - pool->busy_since_ns;
  pthread_mutex_unlock(&pool->mutex);
}

// Fails what was not begun, and has the threads end once what they read is over. May be called again.
EXPORT void mball_pool_stop(Pool *pool) {
  pthread_mutex_lock(&pool->mutex);
  pool->stopping = 1;
  while (pool->first) {
    Request *request = pool->first;
    uint32_t num_left = request->num_chunks - request->num_begun;
    fail(request, request->num_begun, CLOSED, 0);
    dequeue(pool);
    finish(pool, request, num_left);
  }
  pthread_cond_broadcast(&pool->ready);
  pthread_mutex_unlock(&pool->mutex);
}

// Blocks for `most_ns` at most until a pool that was stopped has no thread any more; returns whether it has none.
EXPORT int mball_pool_ended(Pool *pool, int64_t most_ns) {
  if (!mball_pool_drain(pool, most_ns)) return 0;
  pthread_mutex_lock(&pool->mutex);
  uint32_t num_threads = pool->num_threads;  // another caller finds none
  pool->num_threads = 0;
  pthread_mutex_unlock(&pool->mutex);
  while (num_threads) pthread_join(pool->threads[--num_threads], NULL);
  return 1;
}
