// Streams, events and copies of the stand-in; a part of standin.c.
//
// What a stream is given is queued, and run when the order that the test chose says so: at once, as late as possible
// (when somebody waits for it, and then no more than that takes), or by chance after every call. So who forgets a wait
// finds bytes that are not there yet, or not any more. Copies read and write when they run. No thread: a test that
// failed fails again. Pinned memory is what was registered; other memory is copied at once, as the driver does.

typedef struct { int done, num_holders; double time_s; } Point;  // a moment in the work of a stream
typedef struct Work {
  enum { COPY, RECORD, WAIT, SPIN } kind;
  char *to;
  const char *from;
  char *staged;  // the bytes of memory that is not pinned
  size_t size;
  double spin_s;
  int to_device, within_device;
  Point *point;
  struct Work *next;
} Work;
typedef struct Stream { Work *first, **end; int destroyed, capturing; struct Stream *next; } Stream;
typedef struct Event { Point *point; int num_questions, captured, has_time; struct Event *next; } Event;
typedef struct Registered { char *address; size_t size; struct Registered *next; } Registered;

enum { INVALID_HANDLE = 400, NOT_READY = 600, ILLEGAL_ADDRESS = 700, ALREADY_REGISTERED = 712, NOT_REGISTERED = 713 };
enum { STREAM_CAPTURE_UNSUPPORTED = 900, CAPTURED_EVENT = 907, CAPTURE_GLOBAL = 0, CAPTURE_RELAXED = 2 };
enum { EARLIEST, LATEST, RANDOM };

static Stream default_stream = {NULL, &default_stream.first, 0, 0, NULL};
static Stream *streams = &default_stream;
static Event *events;
static Registered *registered;
static int order = EARLIEST;
static unsigned long long chance = 1;
static int num_captures;
static double spun_s;  // no work takes time but what spins
static __thread int capture_mode = CAPTURE_GLOBAL;

static unsigned draw(unsigned below) {
  chance ^= chance << 13, chance ^= chance >> 7, chance ^= chance << 17;
  return (unsigned)(chance >> 33) % below;
}
static void let_go(Point *point) { if (point && !--point->num_holders) free(point); }
static Point *hold(Point *point) { if (point) point->num_holders++; return point; }

// -- running ------------------------------------------------------------------------------------------------------------

static int is_device_memory(const char *start, size_t size) {
  Address address = (Address)(uintptr_t)start, end = address + size;
  for (Range *r = ranges; r; r = r->next)
    if (r->plain && r->address <= address && end <= r->address + r->size) return 1;
  for (Mapping *m = mappings; m && address < end; m = m->next)
    if (m->granted && m->address <= address && address < m->address + m->size) address = m->address + m->size;
  return address >= end;
}
static int is_runnable(const Stream *stream) {
  return stream->first && (stream->first->kind != WAIT || stream->first->point->done);
}
static void forget_first(Stream *stream) {
  Work *gone = stream->first;
  stream->first = gone->next;
  if (!stream->first) stream->end = &stream->first;
  let_go(gone->point);
  free(gone->staged);
  free(gone);
}
static void run_first(Stream *stream) {
  Work *work = stream->first;
  if (work->kind == COPY && !lost) {
    int reached = is_device_memory(work->to_device ? work->to : work->from, work->size);
    if (!reached || (work->within_device && !is_device_memory(work->from, work->size))) lost = ILLEGAL_ADDRESS;
    else memcpy(work->to, work->from, work->size);
  }
  if (work->kind == SPIN) spun_s += work->spin_s;
  if (work->kind == RECORD) work->point->done = 1, work->point->time_s = spun_s;
  forget_first(stream);
}
static int run_any(void) {
  unsigned num = 0;
  for (Stream *s = streams; s; s = s->next) num += is_runnable(s);
  if (!num) return 0;
  unsigned chosen = draw(num);
  for (Stream *s = streams; s; s = s->next)
    if (is_runnable(s) && !chosen--) { run_first(s); break; }
  return 1;
}
static void run_until(Point *point) {
  while (point && !point->done) {
    if (order != LATEST) { if (!run_any()) return; continue; }
    Stream *stream = NULL;  // whose work it is
    for (Stream *s = streams; s && !stream; s = s->next)
      for (Work *w = s->first; w && !stream; w = w->next) if (w->kind == RECORD && w->point == point) stream = s;
    if (!stream) return;
    if (!is_runnable(stream)) run_until(stream->first->point);
    run_first(stream);
  }
}
static void run_stream(Stream *stream) {
  while (stream->first) {
    if (order != LATEST) { if (!run_any()) return; continue; }
    if (!is_runnable(stream)) run_until(stream->first->point);
    run_first(stream);
  }
}
// After every call: time passes.
static void pass_time(void) {
  if (order == EARLIEST) while (run_any()) {}
  if (order == RANDOM) for (unsigned num = draw(4); num && run_any(); num--) {}
  for (Stream **at = &streams; *at;) {
    Stream *stream = *at;
    if (stream->destroyed && !stream->first) { *at = stream->next; free(stream); } else at = &stream->next;
  }
}
static Work *give(Stream *stream, int kind, Point *point) {
  Work *work = calloc(1, sizeof *work);
  work->kind = kind, work->point = point;
  *stream->end = work, stream->end = &work->next;
  return work;
}

// -- the tests' ---------------------------------------------------------------------------------------------------------

void standin_order(int chosen, unsigned long long seed) { order = chosen, chance = seed * 2654435761u + 88172645463325252u; }
void standin_spin(Stream *stream, double seconds) {
  pthread_mutex_lock(&mutex);
  give(stream ? stream : &default_stream, SPIN, NULL)->spin_s = seconds;
  pthread_mutex_unlock(&mutex);
}
void standin_lose(int code) { lost = code; }
// While a stream is captured, threads that are not relaxed may not ask or wait for events.
void standin_capture(Stream *stream, int begins) {
  if (!stream) stream = &default_stream;
  num_captures += begins - stream->capturing;
  stream->capturing = begins;
}
int standin_capture_mode(void) { return capture_mode; }
#define NEEDS_NO_CAPTURE REQUIRE(!num_captures || capture_mode == CAPTURE_RELAXED, STREAM_CAPTURE_UNSUPPORTED)
void standin_run(void) { pthread_mutex_lock(&mutex); while (run_any()) {} pthread_mutex_unlock(&mutex); }
long standin_num_streams(void) { long n = 0; for (Stream *s = streams; s; s = s->next) n += s != &default_stream && !s->destroyed; return n; }
long standin_num_events(void) { long n = 0; for (Event *e = events; e; e = e->next) n++; return n; }
long standin_num_waiting(void) { long n = 0; for (Stream *s = streams; s; s = s->next) for (Work *w = s->first; w; w = w->next) n++; return n; }
size_t standin_registered_bytes(void) { size_t sum = 0; for (Registered *r = registered; r; r = r->next) sum += r->size; return sum; }

static void sweep_streams(void) {
  num_captures = default_stream.capturing = 0, capture_mode = CAPTURE_GLOBAL;
  for (Stream *s = streams; s; s = s->next) while (s->first) forget_first(s);
  while (streams != &default_stream) { Stream *gone = streams; streams = gone->next; free(gone); }
  while (events) { Event *gone = events; events = gone->next; let_go(gone->point); free(gone); }
  while (registered) { Registered *gone = registered; registered = gone->next; free(gone); }
}

// -- streams and events -------------------------------------------------------------------------------------------------

static Stream *find_stream(Stream *stream) {
  if (!stream) return &default_stream;
  for (Stream *s = streams; s; s = s->next) if (s == stream && !s->destroyed) return s;
  return NULL;
}
static Event **find_event(Event *event) {
  Event **at = &events;
  while (*at && *at != event) at = &(*at)->next;
  return at;
}

Result cuCtxGetStreamPriorityRange(int *least, int *greatest) {
  CALL; NEEDS_CONTEXT;
  *least = 0, *greatest = -5;
  return SUCCESS;
}
Result cuStreamCreateWithPriority(Stream **stream, unsigned flags, int priority) {
  CALL; NEEDS_CONTEXT;
  REQUIRE(flags <= 1 && -5 <= priority && priority <= 0, INVALID_VALUE);
  Stream *made = calloc(1, sizeof *made);
  made->end = &made->first, made->next = streams, streams = made;
  *stream = made;
  return SUCCESS;
}
Result cuStreamDestroy(Stream *handle) {
  CALL; NEEDS_CONTEXT;
  Stream *stream = find_stream(handle);
  REQUIRE(stream && handle, INVALID_HANDLE);
  stream->destroyed = 1;
  pass_time();
  return SUCCESS;
}
Result cuStreamSynchronize(Stream *handle) {
  CALL; NEEDS_CONTEXT;
  Stream *stream = find_stream(handle);
  REQUIRE(stream, INVALID_HANDLE);
  run_stream(stream);
  pass_time();
  return lost;
}
Result cuStreamWaitEvent(Stream *handle, Event *event, unsigned flags) {
  CALL; NEEDS_CONTEXT;
  Stream *stream = find_stream(handle);
  REQUIRE(stream && *find_event(event), INVALID_HANDLE);
  REQUIRE(!flags, INVALID_VALUE);
  if (event->point) give(stream, WAIT, hold(event->point));
  pass_time();
  return SUCCESS;
}
Result cuStreamIsCapturing(Stream *handle, int *status) {
  CALL; NEEDS_CONTEXT;
  Stream *stream = find_stream(handle);
  REQUIRE(stream, INVALID_HANDLE);
  *status = stream->capturing;
  return SUCCESS;
}
Result cuThreadExchangeStreamCaptureMode(int *mode) {
  CALL; NEEDS_INIT;
  REQUIRE(CAPTURE_GLOBAL <= *mode && *mode <= CAPTURE_RELAXED, INVALID_VALUE);
  int before = capture_mode;
  capture_mode = *mode, *mode = before;
  return SUCCESS;
}
Result cuEventCreate(Event **event, unsigned flags) {
  CALL; NEEDS_CONTEXT;
  REQUIRE(flags <= 3, INVALID_VALUE);
  Event *made = calloc(1, sizeof *made);
  made->has_time = !(flags & 2);
  made->next = events, events = made;
  *event = made;
  return SUCCESS;
}
Result cuEventDestroy(Event *handle) {
  CALL; NEEDS_CONTEXT;
  Event **at = find_event(handle), *found = *at;
  REQUIRE(found, INVALID_HANDLE);
  *at = found->next;
  let_go(found->point);
  free(found);
  return SUCCESS;
}
Result cuEventRecord(Event *event, Stream *handle) {
  CALL; NEEDS_CONTEXT;
  Stream *stream = find_stream(handle);
  REQUIRE(stream && *find_event(event), INVALID_HANDLE);
  event->captured = stream->capturing;
  let_go(event->point);
  event->point = calloc(1, sizeof *event->point);
  event->point->num_holders = 1, event->num_questions = 0;
  give(stream, RECORD, hold(event->point));
  pass_time();
  return SUCCESS;
}
Result cuEventQuery(Event *event) {
  CALL; NEEDS_CONTEXT; NEEDS_NO_CAPTURE;
  REQUIRE(*find_event(event), INVALID_HANDLE);
  REQUIRE(!event->captured, CAPTURED_EVENT);
  pass_time();
  // However late: who asks again and again is answered some time.
  if (++event->num_questions > 3) run_until(event->point);
  REQUIRE(!lost, lost);
  return !event->point || event->point->done ? SUCCESS : NOT_READY;
}
Result cuEventSynchronize(Event *event) {
  CALL; NEEDS_CONTEXT; NEEDS_NO_CAPTURE;
  REQUIRE(*find_event(event), INVALID_HANDLE);
  REQUIRE(!event->captured, CAPTURED_EVENT);
  run_until(event->point);
  pass_time();
  return lost;
}

Result cuEventElapsedTime(float *milliseconds, Event *first, Event *last) {
  CALL; NEEDS_CONTEXT;
  REQUIRE(*find_event(first) && *find_event(last) && first->has_time && last->has_time, INVALID_HANDLE);
  REQUIRE(first->point && last->point, INVALID_HANDLE);
  REQUIRE(first->point->done && last->point->done, NOT_READY);
  *milliseconds = (float)((last->point->time_s - first->point->time_s) * 1e3);
  return lost;
}

// -- host memory, and copies that do not wait ---------------------------------------------------------------------------

static int touches(const char *address, size_t size, const Registered *r) {
  return address < r->address + r->size && r->address < address + size;
}
// 1 if all of it is pinned as one piece, 0 if none of it is, -1 between.
static int is_pinned(const char *address, size_t size) {
  for (Registered *r = registered; r; r = r->next)
    if (touches(address, size, r)) return r->address <= address && address + size <= r->address + r->size ? 1 : -1;
  return 0;
}

Result cuMemHostRegister(void *address, size_t size, unsigned flags) {
  CALL; NEEDS_CONTEXT;
  REQUIRE(address && size && !flags, INVALID_VALUE);
  REQUIRE(!is_pinned(address, size), ALREADY_REGISTERED);
  Registered *made = malloc(sizeof *made);
  made->address = address, made->size = size, made->next = registered, registered = made;
  return SUCCESS;
}
Result cuMemHostUnregister(void *address) {
  CALL; NEEDS_CONTEXT;
  Registered **at = &registered;
  while (*at && (*at)->address != address) at = &(*at)->next;
  Registered *found = *at;
  REQUIRE(found, NOT_REGISTERED);
  // Stricter than the driver, which says nothing and has the copy use what is there then.
  for (Stream *s = streams; s; s = s->next)
    for (Work *w = s->first; w; w = w->next)
      REQUIRE(w->kind != COPY || w->staged || !touches(w->to_device ? w->from : w->to, w->size, found), INVALID_VALUE);
  *at = found->next;
  free(found);
  return SUCCESS;
}
Result cuMemcpyHtoDAsync(Address to, const void *from, size_t size, Stream *handle) {
  CALL; NEEDS_CONTEXT;
  Stream *stream = find_stream(handle);
  int pinned = is_pinned(from, size);
  REQUIRE(stream, INVALID_HANDLE);
  REQUIRE(pinned >= 0, INVALID_VALUE);
  Work *work = give(stream, COPY, NULL);
  work->to = (char *)(uintptr_t)to, work->from = from, work->size = size, work->to_device = 1;
  if (!pinned) {
    work->from = work->staged = malloc(size);
    memcpy(work->staged, from, size);
  }
  pass_time();
  return SUCCESS;
}
Result cuMemcpyDtoHAsync(void *to, Address from, size_t size, Stream *handle) {
  CALL; NEEDS_CONTEXT;
  Stream *stream = find_stream(handle);
  int pinned = is_pinned(to, size);
  REQUIRE(stream, INVALID_HANDLE);
  REQUIRE(pinned >= 0, INVALID_VALUE);
  Work *work = give(stream, COPY, NULL);
  work->to = to, work->from = (char *)(uintptr_t)from, work->size = size;
  if (!pinned) run_stream(stream);
  pass_time();
  return SUCCESS;
}
Result cuMemcpyDtoDAsync(Address to, Address from, size_t size, Stream *handle) {
  CALL; NEEDS_CONTEXT;
  Stream *stream = find_stream(handle);
  REQUIRE(stream, INVALID_HANDLE);
  Work *work = give(stream, COPY, NULL);
  work->to = (char *)(uintptr_t)to, work->from = (char *)(uintptr_t)from, work->size = size;
  work->to_device = work->within_device = 1;
  pass_time();
  return SUCCESS;
}
