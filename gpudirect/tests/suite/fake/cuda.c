// A driver for tests, built as libcuda.so: the functions that the crate calls, over host memory. Physical memory is a
// memfd, so descriptors pass between processes. It counts what is alive and refuses what a driver would refuse. What
// goes wrong is read from the file $FAKE_CUDA before each call: words, separated by blanks.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { OK = 0, INVALID_VALUE = 1, NO_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101,
       INVALID_CONTEXT = 201, ECC = 214, OPERATING_SYSTEM = 304, INVALID_HANDLE = 400, NOT_READY = 600,
       CONTEXT_IS_DESTROYED = 709, ALREADY_REGISTERED = 712, NOT_REGISTERED = 713, NOT_PERMITTED = 800 };

#define GRANULARITY (2UL << 20)
#ifndef DEVICE_BYTES
#define DEVICE_BYTES (256UL << 20)
#endif
#define MANY 512
#define HELD_MANY 8192

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int initialised, reset;
static long contexts, streams, events;
static unsigned long allocated, handle_count, range_count, map_count, slice_count;
static __thread int current;

static struct { int used, fd; unsigned long bytes; } handles[MANY];
static struct { unsigned long start, bytes; int mapped, accessible; } ranges[MANY];
static struct { unsigned long start, bytes; } slices[MANY];
// What waits in streams, oldest first. Work is asked whether it is done, and holds up its own stream until then.
typedef int work(void *);
static struct { unsigned long target, source, bytes; int set; void *stream; work *work; } held[HELD_MANY];
static int held_count;

static int fault(const char *word) {
  const char *path = getenv("FAKE_CUDA");
  char text[512] = " ";
  if (!path) return 0;
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return 0;
  ssize_t length = read(fd, text + 1, sizeof text - 3);
  close(fd);
  if (length < 0) return 0;
  text[length + 1] = ' ';
  text[length + 2] = 0;
  char padded[64];
  snprintf(padded, sizeof padded, " %s ", word);
  return strstr(text, padded) != NULL;
}

static int ready(void) {
  if (!initialised) return NOT_INITIALIZED;
  if (fault("lost")) return ECC;
  if (reset) return CONTEXT_IS_DESTROYED;
  if (!current) return INVALID_CONTEXT;
  return OK;
}

#define READY() do { int state = ready(); if (state) return state; } while (0)
#define LOCKED(body) do { pthread_mutex_lock(&lock); int result = OK; body; pthread_mutex_unlock(&lock); return result; } while (0)

int cuInit(unsigned flags) {
  if (flags) return INVALID_VALUE;
  while (fault("hang")) usleep(1000);
  if (fault("mismatch")) return 803;
  if (fault("no_device")) return NO_DEVICE;
  initialised = 1;
  return OK;
}
int cuDriverGetVersion(int *version) { *version = fault("old") ? 11040 : 13000; return OK; }
int cuDeviceGetCount(int *count) { if (!initialised) return NOT_INITIALIZED; *count = 1; return OK; }
int cuDeviceGet(int *device, int ordinal) { if (ordinal != 0) return INVALID_DEVICE; *device = 0; return OK; }
int cuDeviceGetName(char *name, int length, int device) { (void)device; snprintf(name, length, "fake device"); return OK; }
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) { (void)device; memset(uuid, 0xF0, 16); return OK; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { (void)device; *bytes = DEVICE_BYTES; return OK; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  switch (attribute) {
    case 75: *value = 9; return OK;
    case 76: *value = 0; return OK;
    case 102: *value = !fault("no_vmm"); return OK;
    case 103: case 110: *value = 1; return OK;
    default: *value = 0; return OK;
  }
}
int cuDeviceCanAccessPeer(int *can, int device, int peer) { (void)device; (void)peer; *can = 0; return OK; }
int cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; contexts++; *context = &contexts; return OK; }
int cuDevicePrimaryCtxRelease_v2(int device) { (void)device; contexts--; return OK; }
int cuDevicePrimaryCtxReset_v2(int device) {
  (void)device;
  while (fault("hang_reset")) usleep(1000);
  held_count = 0;
  reset = 1;
  return OK;
}
int cuCtxSetCurrent(void *context) { if (reset) return CONTEXT_IS_DESTROYED; current = context != NULL; return OK; }
int cuCtxGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return OK; }
int cuStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
  READY();
  if (flags != 1 || priority > 0 || priority < -5) return INVALID_VALUE;
  LOCKED({ streams++; *stream = malloc(1); });
}
int cuStreamDestroy_v2(void *stream) { LOCKED({ streams--; free(stream); }); }

static int is_held(void *stream, int before) {
  for (int at = 0; at < before; at++)
    if (held[at].stream == stream) return 1;
  return 0;
}
static void run_held(void) {
  int kept = 0;
  for (int at = 0; at < held_count; at++) {
    int blocked = is_held(held[at].stream, kept);
    if (!blocked && held[at].work) blocked = !held[at].work((void *)held[at].source);
    else if (!blocked && held[at].set) memset((void *)held[at].target, 0, held[at].bytes);
    else if (!blocked) memmove((void *)held[at].target, (void *)held[at].source, held[at].bytes);
    if (blocked) held[kept++] = held[at];
  }
  held_count = kept;
}
// For cufile.c.
int fake_launch(void *stream, work *work, void *with) {
  READY();
  LOCKED({
    if (held_count == HELD_MANY) result = NO_MEMORY;
    else {
      held[held_count].stream = stream;
      held[held_count].work = work;
      held[held_count++].source = (unsigned long)with;
    }
  });
}

int cuStreamSynchronize(void *stream) {
  READY();
  for (int waits = 1; waits;) {
    while (fault("hold")) usleep(1000);
    pthread_mutex_lock(&lock);
    run_held();
    waits = is_held(stream, held_count);
    pthread_mutex_unlock(&lock);
    if (waits) usleep(1000);
  }
  return OK;
}
int cuEventCreate(void **event, unsigned flags) {
  READY();
  if (flags != 2) return INVALID_VALUE;
  if (fault("no_event")) return NO_MEMORY;
  LOCKED({ events++; *event = calloc(1, sizeof(void *)); });
}
int cuEventRecord(void *event, void *stream) {
  READY();
  if (!event || !stream) return INVALID_HANDLE;
  *(void **)event = stream;
  return OK;
}
// It stands for all that its stream was given until now, which is more than a driver's event says.
int cuEventQuery(void *event) {
  READY();
  if (!event) return INVALID_HANDLE;
  if (fault("hold")) return NOT_READY;
  LOCKED({
    run_held();
    if (is_held(*(void **)event, held_count)) result = NOT_READY;
  });
}
int cuEventDestroy_v2(void *event) { LOCKED({ events--; free(event); }); }
int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
  READY();
  LOCKED({ *free_bytes = DEVICE_BYTES - allocated; *total = DEVICE_BYTES; });
}

struct location { int type, id; };
struct properties { int type, handle_types; struct location location; void *windows; unsigned char flags[8]; };
struct access { struct location location; int flags; };

static int proper(const struct properties *p) {
  return p->type == 1 && p->handle_types == 1 && p->location.type == 1 && p->location.id == 0 && !p->windows && !p->flags[0];
}

int cuMemGetAllocationGranularity(size_t *bytes, const struct properties *p, int option) {
  if (!proper(p) || option > 1) return INVALID_VALUE;
  *bytes = GRANULARITY;
  return OK;
}

// A handle for a memfd; -1 when there are too many.
static long take_handle(int fd, unsigned long bytes) {
  for (long at = 0; at < MANY; at++) {
    if (handles[at].used) continue;
    handles[at].used = 1;
    handles[at].fd = fd;
    handles[at].bytes = bytes;
    handle_count++;
    return at;
  }
  return -1;
}

int cuMemCreate(unsigned long long *handle, size_t bytes, const struct properties *p, unsigned long long flags) {
  READY();
  if (!proper(p) || !p->flags[1] || flags || !bytes || bytes % GRANULARITY) return INVALID_VALUE;
  if (fault("no_memory")) return NO_MEMORY;
  LOCKED({
    if (allocated + bytes > DEVICE_BYTES) result = NO_MEMORY;
    else {
      int fd = memfd_create("fake-device", MFD_CLOEXEC | MFD_ALLOW_SEALING);
      if (fd < 0 || ftruncate(fd, bytes) || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW)) result = OPERATING_SYSTEM;
      else {
        // What a driver leaves in fresh memory is anything.
        void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        memset(at, 0xDB, bytes);
        munmap(at, bytes);
        allocated += bytes;
        *handle = 1 + take_handle(fd, bytes);
      }
    }
  });
}
int cuMemRelease(unsigned long long handle) {
  LOCKED({
    long at = (long)handle - 1;
    if (at < 0 || at >= MANY || !handles[at].used) result = INVALID_VALUE;
    else {
      close(handles[at].fd);
      allocated -= handles[at].bytes < allocated ? handles[at].bytes : allocated;
      handles[at].used = 0;
      handle_count--;
    }
  });
}
static long range_at(unsigned long start, unsigned long bytes) {
  for (long at = 0; at < MANY; at++)
    if (ranges[at].start == start && ranges[at].bytes == bytes) return at;
  return -1;
}
int cuMemAddressReserve(unsigned long long *address, size_t bytes, size_t alignment, unsigned long long wanted, unsigned long long flags) {
  READY();
  if (!bytes || bytes % GRANULARITY || alignment || wanted || flags) return INVALID_VALUE;
  if (fault("no_range")) return NO_MEMORY;
  LOCKED({
    void *start = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    long at = range_at(0, 0);
    if (start == MAP_FAILED || at < 0) result = NO_MEMORY;
    else {
      ranges[at].start = *address = (unsigned long)start;
      ranges[at].bytes = bytes;
      ranges[at].mapped = ranges[at].accessible = 0;
      range_count++;
    }
  });
}
int cuMemAddressFree(unsigned long long start, size_t bytes) {
  LOCKED({
    long at = range_at(start, bytes);
    if (at < 0 || ranges[at].mapped) result = INVALID_VALUE;
    else {
      munmap((void *)start, bytes);
      ranges[at].start = ranges[at].bytes = 0;
      range_count--;
    }
  });
}
int cuMemMap(unsigned long long start, size_t bytes, size_t offset, unsigned long long handle, unsigned long long flags) {
  READY();
  if (fault("no_map")) return NOT_PERMITTED;
  LOCKED({
    long at = range_at(start, bytes);
    long of = (long)handle - 1;
    if (at < 0 || ranges[at].mapped || offset || flags || of < 0 || of >= MANY || !handles[of].used ||
        handles[of].bytes != bytes)
      result = INVALID_VALUE;
    else if (mmap((void *)start, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, handles[of].fd, 0) == MAP_FAILED)
      result = NO_MEMORY;
    else {
      ranges[at].mapped = 1;
      map_count++;
    }
  });
}
int cuMemSetAccess(unsigned long long start, size_t bytes, const struct access *access, size_t count) {
  READY();
  LOCKED({
    long at = range_at(start, bytes);
    if (at < 0 || !ranges[at].mapped || count != 1 || access->location.type != 1 || access->flags != 3)
      result = INVALID_VALUE;
    else {
      mprotect((void *)start, bytes, PROT_READ | PROT_WRITE);
      ranges[at].accessible = 1;
    }
  });
}
int cuMemUnmap(unsigned long long start, size_t bytes) {
  LOCKED({
    long at = range_at(start, bytes);
    if (at < 0 || !ranges[at].mapped) result = INVALID_VALUE;
    else {
      mmap((void *)start, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
      ranges[at].mapped = ranges[at].accessible = 0;
      map_count--;
    }
  });
}
int cuMemExportToShareableHandle(int *fd, unsigned long long handle, int type, unsigned long long flags) {
  READY();
  LOCKED({
    long at = (long)handle - 1;
    if (type != 1 || flags || at < 0 || at >= MANY || !handles[at].used) result = INVALID_VALUE;
    else *fd = dup(handles[at].fd);
  });
}
int cuMemImportFromShareableHandle(unsigned long long *handle, void *named, int type) {
  READY();
  struct stat facts;
  int fd = (int)(intptr_t)named;
  char link[64], target[256] = "";
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  if (readlink(link, target, sizeof target - 1) < 0 || !strstr(target, "fake-device")) return INVALID_VALUE;
  if (type != 1 || fstat(fd, &facts)) return INVALID_VALUE;
  LOCKED({
    int own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    allocated += facts.st_size;
    *handle = 1 + take_handle(own, facts.st_size);
  });
}

// Whether a range lies in memory that the device may touch.
static int on_device(unsigned long start, unsigned long bytes) {
  for (long at = 0; at < MANY; at++)
    if (ranges[at].accessible && start >= ranges[at].start && start + bytes <= ranges[at].start + ranges[at].bytes) return 1;
  return 0;
}
// A driver takes no copy that begins in registered memory and leaves its registration.
static int whole(unsigned long start, unsigned long bytes) {
  for (long at = 0; at < MANY; at++)
    if (slices[at].bytes && start < slices[at].start + slices[at].bytes && start + bytes > slices[at].start)
      return start >= slices[at].start && start + bytes <= slices[at].start + slices[at].bytes;
  return 1;
}
static int move(unsigned long target, unsigned long source, unsigned long bytes, int set, void *stream) {
  READY();
  if (!stream) return INVALID_HANDLE;
  if (fault("no_copy")) return INVALID_VALUE;
  LOCKED({
    if (held_count == HELD_MANY) result = NO_MEMORY;
    else {
      held[held_count].target = target;
      held[held_count].source = source;
      held[held_count].stream = stream;
      held[held_count].work = NULL;
      held[held_count].bytes = bytes;
      held[held_count++].set = set;
    }
  });
}
int cuMemsetD8Async(unsigned long long target, unsigned char value, size_t bytes, void *stream) {
  if (!on_device(target, bytes) || value) return INVALID_VALUE;
  return move(target, 0, bytes, 1, stream);
}
int cuMemcpyHtoDAsync_v2(unsigned long long target, const void *source, size_t bytes, void *stream) {
  if (fault("slow_copy")) usleep(1000);
  if (!on_device(target, bytes) || !whole((unsigned long)source, bytes)) return INVALID_VALUE;
  return move(target, (unsigned long)source, bytes, 0, stream);
}
int cuMemcpyDtoHAsync_v2(void *target, unsigned long long source, size_t bytes, void *stream) {
  if (!on_device(source, bytes) || !whole((unsigned long)target, bytes)) return INVALID_VALUE;
  return move((unsigned long)target, source, bytes, 0, stream);
}
int cuMemcpyDtoDAsync_v2(unsigned long long target, unsigned long long source, size_t bytes, void *stream) {
  if (!on_device(target, bytes) || !on_device(source, bytes)) return INVALID_VALUE;
  return move(target, source, bytes, 0, stream);
}
int cuMemcpyAsync(unsigned long long target, unsigned long long source, size_t bytes, void *stream) {
  return cuMemcpyDtoDAsync_v2(target, source, bytes, stream);
}
int cuMemHostRegister_v2(void *start, size_t bytes, unsigned flags) {
  READY();
  if (!bytes || flags != 1) return INVALID_VALUE;
  if (fault("no_register")) return NOT_PERMITTED;
  LOCKED({
    long free_at = -1;
    for (long at = 0; at < MANY; at++) {
      if (!slices[at].bytes) free_at = at;
      else if ((unsigned long)start < slices[at].start + slices[at].bytes && (unsigned long)start + bytes > slices[at].start)
        result = ALREADY_REGISTERED;
    }
    if (!result && free_at < 0) result = NO_MEMORY;
    if (!result) {
      slices[free_at].start = (unsigned long)start;
      slices[free_at].bytes = bytes;
      slice_count++;
    }
  });
}
int cuMemHostUnregister(void *start) {
  LOCKED({
    result = NOT_REGISTERED;
    for (long at = 0; at < MANY; at++)
      if (slices[at].bytes && slices[at].start == (unsigned long)start) {
        slices[at].bytes = slices[at].start = 0;
        slice_count--;
        result = OK;
      }
  });
}

// What is alive, as a line of text.
void fake_live(char *text, size_t length) {
  pthread_mutex_lock(&lock);
  snprintf(text, length, "contexts=%ld streams=%ld events=%ld handles=%lu ranges=%lu maps=%lu slices=%lu", contexts,
           streams, events, handle_count, range_count, map_count, slice_count);
  pthread_mutex_unlock(&lock);
}
