/* A clock that another program can move, in front of the C library's (LD_PRELOAD): the file that SOAK_CLOCK names
 * holds a 64-bit offset in seconds, which is added to the time of day. CLOCK_MONOTONIC stays.
 *
 * Not libfaketime: that takes a lock in every call, which a process that forks (data workers) leaves locked in its
 * child when another thread holds it. Here nothing is locked. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t *mapped;

__attribute__((constructor)) static void map_offset(void) {
    const char *path = getenv("SOAK_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *memory = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
    if (memory != MAP_FAILED) mapped = memory;
    close(file);
}

static int64_t offset(void) { return mapped ? *mapped : 0; }

int clock_gettime(clockid_t clock, struct timespec *now) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += offset();
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int (*real)(struct timeval *, void *) = dlsym(RTLD_NEXT, "gettimeofday");
    int failed = real(now, zone);
    if (!failed) now->tv_sec += offset();
    return failed;
}

time_t time(time_t *now) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (now) *now = exact.tv_sec;
    return exact.tv_sec;
}

/* waits until a time of day: the kernel's clock is the machine's */
static struct timespec of_machine(const struct timespec *until) {
    struct timespec moved = *until;
    moved.tv_sec -= offset();
    return moved;
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict until) {
    int (*real)(sem_t *, const struct timespec *) = dlsym(RTLD_NEXT, "sem_timedwait");
    struct timespec moved = of_machine(until);
    return real(semaphore, &moved);
}

int pthread_cond_timedwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict until) {
    int (*real)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *) =
        dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    struct timespec seen;
    clock_gettime(CLOCK_REALTIME, &seen);
    /* a condition may be one of CLOCK_MONOTONIC, whose times are far below those of day */
    struct timespec moved = until->tv_sec > seen.tv_sec / 2 ? of_machine(until) : *until;
    return real(condition, mutex, &moved);
}
