/* Puts so many values of one size into Redis over a Unix socket, and gets them for so many seconds, `batch` at once.
 * Prints GiB/s. The reply lies in memory of this process, as hiredis leaves it: no further copy, no check. */
#include <hiredis/hiredis.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec / 1e9;
}

static redisReply *take(redisContext *redis) {
  redisReply *reply = NULL;
  if (redisGetReply(redis, (void **)&reply) != REDIS_OK || reply->type == REDIS_REPLY_ERROR) {
    fprintf(stderr, "redis: %s\n", reply ? reply->str : redis->errstr);
    exit(1);
  }
  return reply;
}

int main(int argc, char **argv) {
  if (argc != 6) return 2;
  size_t size = strtoull(argv[2], NULL, 10);
  long count = atol(argv[3]), batch = atol(argv[4]), done = 0, at = 0;
  double seconds = atof(argv[5]), began;
  redisContext *redis = redisConnectUnix(argv[1]);
  if (redis == NULL || redis->err) return 1;
  redis->reader->maxbuf = 0; /* Keeps its buffer instead of allocating one for each large reply. */
  char *value = malloc(size);
  memset(value, 7, size);
  for (long key = 0; key < count; key++) {
    redisAppendCommand(redis, "SET %lu:%ld %b", (unsigned long)size, key, value, size);
    freeReplyObject(take(redis));
  }
  for (began = now(); now() - began < seconds; done += batch) {
    for (long one = 0; one < batch; one++) redisAppendCommand(redis, "GET %lu:%ld", (unsigned long)size, (at + one) % count);
    for (long one = 0; one < batch; one++) {
      redisReply *reply = take(redis);
      if (reply->type != REDIS_REPLY_STRING || reply->len != size) return 1;
      freeReplyObject(reply);
    }
    at = (at + batch) % count;
  }
  printf("%f\n", done * (double)size / (now() - began) / (1 << 30));
  return 0;
}
