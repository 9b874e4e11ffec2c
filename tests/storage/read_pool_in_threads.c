// Many threads submit to one pool after another, wait, look and close, while reads fail, are short, are interrupted and
// are refused; and a pool is stopped in the middle. Compiled together with read_pool.c.
#define _GNU_SOURCE
#include <assert.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>

#include "read_pool.c"

enum { FILE_SIZE = 1 << 16, PIECE = 1 << 12, SUBMITTERS = 3, IN_FLIGHT = 8, CHUNKS = 5 };
static const int64_t SHORT_NS = 1000000;

static int file;
static unsigned char content[FILE_SIZE];
static _Atomic uint64_t counter, num_failed, num_refused, num_closed, num_read;

// By chance, but for what chance cannot say: whether it was asked past the page cache.
static ssize_t by_chance(int descriptor, const struct iovec *memory, int count, off_t offset) {
  uint64_t chance = atomic_fetch_add(&counter, 1) * UINT64_C(0x9E3779B97F4A7C15) >> 57;
  (void)descriptor;
  if (chance < 12) return errno = EINTR, -1;
  if (chance < 20) return errno = EINVAL, -1;
  if (chance < 24) return errno = EIO, -1;
  struct iovec less = *memory;
  if (chance < 60 && less.iov_len > 100) less.iov_len = 1 + chance * 17 % (less.iov_len - 1);
  return preadv(file, &less, count, offset);
}

typedef struct {
  Pool *pool;
  unsigned seed;
  int turns;
} Submitter;

static void check(const Request *request, const Chunk *chunks) {
  if (request->refused) atomic_fetch_add(&num_refused, 1);
  if (request->error == CLOSED) {
    atomic_fetch_add(&num_closed, 1);
  } else if (request->error) {
    assert(request->error == EIO || request->error == EINVAL);
    assert(request->failed < request->num_chunks);
    atomic_fetch_add(&num_failed, 1);
  } else {
    for (uint32_t i = 0; i < request->num_chunks; ++i) {
      assert(!memcmp(chunks[i].address, content + chunks[i].offset, chunks[i].required));
    }
    assert(request->began_ns && request->began_ns <= request->ended_ns);
    atomic_fetch_add(&num_read, 1);
  }
}

static void *submit(void *argument) {
  Submitter *submitter = argument;
  Request requests[IN_FLIGHT] = {0};
  Chunk chunks[IN_FLIGHT][CHUNKS];
  char *memory = malloc(IN_FLIGHT * CHUNKS * PIECE);
  for (int turn = 0; turn < submitter->turns; ++turn) {
    int slot = turn % IN_FLIGHT;
    Request *request = &requests[slot];
    if (request->num_chunks) {
      while (!mball_request_wait(submitter->pool, request, SHORT_NS)) {}
      check(request, chunks[slot]);
    }
    uint32_t num_chunks = 1 + rand_r(&submitter->seed) % CHUNKS;
    for (uint32_t i = 0; i < num_chunks; ++i) {
      uint64_t size = 1 + rand_r(&submitter->seed) % PIECE;
      chunks[slot][i] = (Chunk){
          .buffered = 0, .direct = rand_r(&submitter->seed) % 2 ? 1 : -1,
          .offset = rand_r(&submitter->seed) % (FILE_SIZE - PIECE), .address = memory + (slot * CHUNKS + i) * PIECE,
          .size = size, .required = size, .alignment = 512,
      };
    }
    *request = (Request){.chunks = chunks[slot], .num_chunks = num_chunks};
    if (mball_pool_submit(submitter->pool, request)) {
      atomic_fetch_add(&num_closed, 1);
      request->num_chunks = 0;
    }
    Statistics statistics;
    mball_pool_statistics(submitter->pool, &statistics);
    if (turn % 16 == 0) mball_pool_drain(submitter->pool, SHORT_NS);
  }
  for (int slot = 0; slot < IN_FLIGHT; ++slot) {
    if (!requests[slot].num_chunks) continue;
    while (!mball_request_wait(submitter->pool, &requests[slot], SHORT_NS)) {}
    check(&requests[slot], chunks[slot]);
  }
  free(memory);
  return NULL;
}

int main(int argc, char **argv) {
  assert(argc == 3);
  int turns = atoi(argv[1]);
  for (int i = 0; i < FILE_SIZE; ++i) content[i] = (unsigned char)(i * 31 + i / 251);
  file = open(argv[2], O_RDWR | O_CREAT | O_TRUNC, 0600);
  assert(write(file, content, FILE_SIZE) == FILE_SIZE);
  mball_read_by(by_chance);
  for (int round = 0; round < 8; ++round) {
    Pool *pool = calloc(1, mball_pool_size());
    assert(!mball_pool_start(pool, 4) && !mball_pool_start(pool, 4));
    pthread_t threads[SUBMITTERS];
    Submitter submitters[SUBMITTERS];
    for (int i = 0; i < SUBMITTERS; ++i) {
      submitters[i] = (Submitter){.pool = pool, .seed = (unsigned)(round * 10 + i), .turns = turns};
      pthread_create(&threads[i], NULL, submit, &submitters[i]);
    }
    if (round % 2) {  // in the middle
      struct timespec nap = {0, 300000 * (round + 1)};
      nanosleep(&nap, NULL);
      mball_pool_stop(pool);
    }
    for (int i = 0; i < SUBMITTERS; ++i) pthread_join(threads[i], NULL);
    mball_pool_stop(pool);
    while (!mball_pool_ended(pool, SHORT_NS)) {}
    Request late = {.num_chunks = 1};
    assert(mball_pool_submit(pool, &late) == CLOSED);
    free(pool);
  }
  printf("%llu %llu %llu %llu\n", (unsigned long long)num_read, (unsigned long long)num_failed,
         (unsigned long long)num_refused, (unsigned long long)num_closed);
  return 0;
}
