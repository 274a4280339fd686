// cuFile for tests, built as libcufile.so.0, over the driver of cuda.c: device memory is host memory, so a transfer is a
// pread or a pwrite. What goes wrong is read from the file $FAKE_CUDA before each call.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

typedef struct { int error, cuda_error; } status;
static const status OK = { 0, 0 };
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int opened;
static long handles, buffers, batches, streams;

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
static void count(long *of, long by) {
  pthread_mutex_lock(&lock);
  *of += by;
  pthread_mutex_unlock(&lock);
}

status cuFileDriverOpen(void) {
  if (fault("no_module")) return (status){ 5033, 0 };
  if (opened) return (status){ 5026, 0 };
  opened = 1;
  return OK;
}
struct properties { unsigned major, minor; size_t poll, direct_kib; unsigned status_flags, control_flags, rest[6]; };
status cuFileDriverGetProperties(struct properties *p) {
  memset(p, 0, sizeof *p);
  if (!fault("compat")) { p->major = 2; p->minor = 25; p->status_flags = 1 << 4; }
  p->direct_kib = 16384;
  return OK;
}
struct description { unsigned kind; union { int fd; void *windows; } handle; const void *operations; };
status cuFileHandleRegister(void **handle, struct description *d) {
  if (d->kind != 1 || d->operations || !(fcntl(d->handle.fd, F_GETFL) & O_DIRECT)) return (status){ 5022, 0 };
  if (fault("no_handle")) return (status){ 5007, 0 };
  int *fd = malloc(sizeof *fd);
  *fd = d->handle.fd;
  *handle = fd;
  count(&handles, 1);
  return OK;
}
void cuFileHandleDeregister(void *handle) { free(handle); count(&handles, -1); }
status cuFileBufRegister(const void *base, size_t length, int flags) {
  if (!base || !length || flags || fault("no_buffer")) return (status){ 5019, 0 };
  count(&buffers, 1);
  return OK;
}
status cuFileBufDeregister(const void *base) { (void)base; count(&buffers, -1); return OK; }

// Not what the file has there, whoever else lies about the same byte meanwhile.
static void lie(int fd, char *byte, off_t file) {
  char *page = NULL;
  if (posix_memalign((void **)&page, 4096, 4096)) abort();
  if (pread(fd, page, 4096, file) > 0) *byte = page[0] ^ 1;
  free(page);
}
static ssize_t move_now(void *handle, char *base, size_t size, off_t file, off_t device, int write) {
  if (fault("file_error")) return -5030;
  if (fault("file_idle")) return size;
  int fd = *(int *)handle;
  ssize_t moved = write ? pwrite(fd, base + device, size, file) : pread(fd, base + device, size, file);
  if (moved > 0 && !write && fault("file_lies")) lie(fd, base + device, file);
  return moved > 0 && fault("file_short") ? moved / 2 : moved;
}
static ssize_t move(void *handle, char *base, size_t size, off_t file, off_t device, int write) {
  while (fault("file_hang")) usleep(1000);
  return move_now(handle, base, size, file, device, write);
}
ssize_t cuFileRead(void *h, void *base, size_t size, off_t file, off_t device) { return move(h, base, size, file, device, 0); }
ssize_t cuFileWrite(void *h, const void *base, size_t size, off_t file, off_t device) { return move(h, (char *)base, size, file, device, 1); }

struct request { unsigned mode; void *base; off_t file, device; size_t size; void *handle; unsigned operation; void *cookie; };
struct event { void *cookie; unsigned status; size_t result; };
struct batch { unsigned most, count, done; struct request requests[128]; };
status cuFileBatchIOSetUp(void **batch, unsigned most) {
  if (!most || most > 128 || fault("no_batch")) return (status){ 5022, 0 };
  struct batch *b = calloc(1, sizeof *b);
  b->most = most;
  *batch = b;
  count(&batches, 1);
  return OK;
}
status cuFileBatchIOSubmit(void *batch, unsigned count_of, struct request *requests, unsigned flags) {
  struct batch *b = batch;
  if (count_of > b->most || flags) return (status){ 5022, 0 };
  if (fault("no_submit")) return (status){ 5030, 0 };
  for (unsigned at = 0; at < count_of; at++) {
    if (requests[at].mode != 1 || requests[at].operation != requests[0].operation) return (status){ 5022, 0 };
    b->requests[b->count++] = requests[at];
  }
  return OK;
}
// One event a call, so that whoever asks has to ask again.
status cuFileBatchIOGetStatus(void *batch, unsigned least, unsigned *count_of, struct event *events, struct timespec *patience) {
  struct batch *b = batch;
  if (least > *count_of || !patience) return (status){ 5022, 0 };
  if (fault("file_hang")) { usleep(1000); *count_of = 0; return OK; }
  struct request *r = &b->requests[b->done++];
  ssize_t moved = move(r->handle, r->base, r->size, r->file, r->device, r->operation);
  events[0] = (struct event){ r->cookie, moved < 0 ? 1 << 6 : 1 << 4, (size_t)moved };
  *count_of = 1;
  return OK;
}
void cuFileBatchIODestroy(void *batch) { free(batch); count(&batches, -1); }

// In the order of a stream of the driver beside this library. Numbers are read when the transfer is given, as whoever
// registers a stream as this one allows, and once more when it happens: they must be there and be the same.
status cuFileStreamRegister(void *stream, unsigned flags) {
  if (!stream || flags != 15) return (status){ 5022, 0 };
  if (fault("no_stream")) return (status){ 5030, 0 };
  count(&streams, 1);
  return OK;
}
status cuFileStreamDeregister(void *stream) { (void)stream; count(&streams, -1); return OK; }
struct order { void *handle; char *base; size_t *size_at, size; off_t *file_at, *device_at, file, device; ssize_t *moved; int write; };
static int perform(void *with) {
  struct order *o = with;
  if (fault("file_hang")) return 0;
  ssize_t moved = -5022;
  if (*o->size_at == o->size && *o->file_at == o->file && *o->device_at == o->device)
    moved = move_now(o->handle, o->base, o->size, o->file, o->device, o->write);
  if (!fault("untold")) __atomic_store_n(o->moved, moved, __ATOMIC_RELEASE);
  free(o);
  return 1;
}
static status give(void *h, void *base, size_t *size, off_t *file, off_t *device, ssize_t *moved, void *stream, int write) {
  if (fault("no_submit") || (fault("no_second_submit") && *file)) return (status){ 5030, 0 };
  if (*size % 4096 || *file % 4096 || *device % 4096) return (status){ 5022, 0 };
  void *driver = dlopen("libcuda.so", RTLD_NOW | RTLD_NOLOAD);
  int (*launch)(void *, int (*)(void *), void *) = driver ? dlsym(driver, "fake_launch") : NULL;
  if (!launch) return (status){ 5001, 0 };
  struct order *o = malloc(sizeof *o);
  *o = (struct order){ h, base, size, *size, file, device, *file, *device, moved, write };
  int failed = launch(stream, perform, o);
  if (failed) free(o);
  return (status){ 0, failed };
}
status cuFileReadAsync(void *h, void *base, size_t *size, off_t *file, off_t *device, ssize_t *moved, void *stream) {
  return give(h, base, size, file, device, moved, stream, 0);
}
status cuFileWriteAsync(void *h, void *base, size_t *size, off_t *file, off_t *device, ssize_t *moved, void *stream) {
  return give(h, base, size, file, device, moved, stream, 1);
}

void fake_files_live(char *text, size_t length) {
  pthread_mutex_lock(&lock);
  snprintf(text, length, "handles=%ld buffers=%ld batches=%ld streams=%ld", handles, buffers, batches, streams);
  pthread_mutex_unlock(&lock);
}
