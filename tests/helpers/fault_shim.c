/* Makes selected file operations fail. faults.py preloads this library and documents its use.
 *
 * FAULT_CONTROL names a file that contains the struct below. All processes map this file, so faults
 * can be switched on and off from outside while a program runs. FAULT_FOLDERS lists absolute paths,
 * separated by ":"; only calls on these paths and below them can fail. FAULT_LOG gets a line
 * "fail CALL PATH" for each fault, and "pass CALL PATH" for each other call while `logging` is on.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE, FSYNC, RENAME, OPEN, CREATE, READ, STAT, MKDIR, UNLINK };
static const char *const NAMES[] = {"write", "fsync", "rename", "open", "create",
                                    "read",  "stat",  "mkdir",  "unlink"};

struct control {           /* same order of fields as in faults.py */
    int32_t calls;         /* a bit for each kind of call that may fail */
    int32_t error;         /* errno */
    int32_t first, last;   /* matching calls fail if first <= number < last */
    int32_t every;         /* of these, only every n-th, from `first` on */
    int32_t logging;
    int32_t number;        /* number of the next matching call */
    int32_t shortened;     /* whether half of a write was accepted already (ENOSPC) */
    char pattern[4000];    /* fnmatch pattern of the whole path; "" matches all */
};

static struct control *control;
static const char *folders;
static int log_file = -1;

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("FAULT_CONTROL"), *log = getenv("FAULT_LOG");
    folders = getenv("FAULT_FOLDERS");
    if (path == NULL || folders == NULL) return;
    int file = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC);
    if (file < 0) return;
    void *mapped = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    syscall(SYS_close, file);
    if (mapped == MAP_FAILED) return;
    if (log != NULL)
        log_file = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    control = mapped;
}

static int concerned(const char *path) {
    for (const char *from = folders; *from;) {
        size_t length = strcspn(from, ":");
        if (length && !strncmp(path, from, length) && (path[length] == '/' || !path[length]))
            return 1;
        from += length + (from[length] == ':');
    }
    return 0;
}

static void note(const char *what, int call, const char *path) {
    char line[4200];
    int length = snprintf(line, sizeof line, "%s %s %s\n", what, NAMES[call], path);
    if (log_file >= 0) syscall(SYS_write, log_file, line, length);
}

/* Returns 1 and sets errno if a call on a path must fail. */
static int fails(int call, const char *path) {
    if (!(control->calls >> call & 1)) return 0;
    if (*control->pattern && fnmatch(control->pattern, path, FNM_PATHNAME)) return 0;
    int number = __atomic_fetch_add(&control->number, 1, __ATOMIC_SEQ_CST);
    if (number < control->first || number >= control->last) return 0;
    if ((number - control->first) % control->every) return 0;
    note("fail", call, path);
    errno = control->error;
    return 1;
}

static int on_path(int call, int folder, const char *path) {
    char whole[8300], link[40];
    if (control == NULL || path == NULL || !(control->calls | control->logging)) return 0;
    int before = errno;
    if (path[0] != '/') {
        if (folder == AT_FDCWD) strcpy(link, "/proc/self/cwd");
        else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, whole, 4100);
        errno = before;
        if (length < 0) return 0;
        snprintf(whole + length, sizeof whole - length, "/%s", path);
        path = whole;
    }
    if (!concerned(path)) return 0;
    if (fails(call, path)) return 1;
    if (control->logging) note("pass", call, path);
    errno = before;
    return 0;
}

static int on_file(int call, int file) {
    char link[40], path[4100];
    if (control == NULL || !(control->calls | control->logging)) return 0;
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    errno = before;
    if (length <= 0 || path[0] != '/') return 0;
    path[length] = 0;
    return on_path(call, AT_FDCWD, path);
}

/* A full disk writes what still fits; only the next write fails. */
static int on_write(int file, size_t *size) {
    if (!on_file(WRITE, file)) return 0;
    if (control->error != ENOSPC || *size < 2) return 1;
    if (__atomic_exchange_n(&control->shortened, 1, __ATOMIC_SEQ_CST)) return 1;
    __atomic_fetch_sub(&control->number, 1, __ATOMIC_SEQ_CST);
    *size /= 2;
    return 0;
}

ssize_t write(int file, const void *data, size_t size) {
    return on_write(file, &size) ? -1 : syscall(SYS_write, file, data, size);
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
    return on_write(file, &size) ? -1 : syscall(SYS_pwrite64, file, data, size, at);
}
ssize_t pwrite(int file, const void *data, size_t size, off_t at) {
    return pwrite64(file, data, size, at);
}
ssize_t writev(int file, const struct iovec *parts, int count) {
    return on_file(WRITE, file) ? -1 : syscall(SYS_writev, file, parts, count);
}
ssize_t pwritev64v2(int file, const struct iovec *parts, int count, off64_t at, int flags) {
    return on_file(WRITE, file) ? -1 : syscall(SYS_pwritev2, file, parts, count, at, 0, flags);
}
int ftruncate64(int file, off64_t size) {
    return on_file(WRITE, file) ? -1 : syscall(SYS_ftruncate, file, size);
}
int ftruncate(int file, off_t size) { return ftruncate64(file, size); }
ssize_t sendfile64(int out, int in, off64_t *at, size_t size) {
    if (on_file(READ, in) || on_write(out, &size)) return -1;
    return syscall(SYS_sendfile, out, in, at, size);
}
ssize_t sendfile(int out, int in, off_t *at, size_t size) { return sendfile64(out, in, at, size); }
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    if (on_file(READ, in) || on_write(out, &size)) return -1;
    return syscall(SYS_copy_file_range, in, from, out, to, size, flags);
}

int fsync(int file) { return on_file(FSYNC, file) ? -1 : syscall(SYS_fsync, file); }
int fdatasync(int file) { return on_file(FSYNC, file) ? -1 : syscall(SYS_fdatasync, file); }

int renameat2(int a, const char *old, int b, const char *new, unsigned flags) {
    if (on_path(RENAME, b, new)) return -1;
    return syscall(SYS_renameat2, a, old, b, new, flags);
}
int renameat(int a, const char *old, int b, const char *new) {
    return renameat2(a, old, b, new, 0);
}
int rename(const char *old, const char *new) {
    return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0);
}
int linkat(int a, const char *old, int b, const char *new, int flags) {
    return on_path(RENAME, b, new) ? -1 : syscall(SYS_linkat, a, old, b, new, flags);
}
int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }

static int open_file(int folder, const char *path, int flags, mode_t mode) {
    int creates = flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE;
    if (on_path(creates ? CREATE : OPEN, folder, path)) return -1;
    return syscall(SYS_openat, folder, path, flags, mode);
}
#define MODE(flags)                                                                       \
    mode_t mode = 0;                                                                      \
    if ((flags) & O_CREAT || ((flags) & O_TMPFILE) == O_TMPFILE) {                        \
        va_list rest;                                                                     \
        va_start(rest, flags);                                                            \
        mode = va_arg(rest, mode_t);                                                      \
        va_end(rest);                                                                     \
    }
int open(const char *path, int flags, ...) {
    MODE(flags)
    return open_file(AT_FDCWD, path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    MODE(flags)
    return open_file(AT_FDCWD, path, flags, mode);
}
int openat(int folder, const char *path, int flags, ...) {
    MODE(flags)
    return open_file(folder, path, flags, mode);
}
int openat64(int folder, const char *path, int flags, ...) {
    MODE(flags)
    return open_file(folder, path, flags, mode);
}
int __open_2(const char *path, int flags) { return open_file(AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return open_file(AT_FDCWD, path, flags, 0); }
int __openat_2(int folder, const char *path, int flags) {
    return open_file(folder, path, flags, 0);
}
int __openat64_2(int folder, const char *path, int flags) {
    return open_file(folder, path, flags, 0);
}
#define NEXT(type, name) ((type)dlsym(RTLD_NEXT, name))
FILE *fopen64(const char *path, const char *mode) {
    if (on_path(mode[0] == 'r' ? OPEN : CREATE, AT_FDCWD, path)) return NULL;
    return NEXT(FILE * (*)(const char *, const char *), "fopen64")(path, mode);
}
FILE *fopen(const char *path, const char *mode) { return fopen64(path, mode); }
DIR *opendir(const char *path) {
    if (on_path(OPEN, AT_FDCWD, path)) return NULL;
    return NEXT(DIR * (*)(const char *), "opendir")(path);
}

ssize_t read(int file, void *data, size_t size) {
    return on_file(READ, file) ? -1 : syscall(SYS_read, file, data, size);
}
ssize_t __read_chk(int file, void *data, size_t size, size_t room) {
    return read(file, data, size < room ? size : room);
}
ssize_t pread64(int file, void *data, size_t size, off64_t at) {
    return on_file(READ, file) ? -1 : syscall(SYS_pread64, file, data, size, at);
}
ssize_t pread(int file, void *data, size_t size, off_t at) {
    return pread64(file, data, size, at);
}
ssize_t readv(int file, const struct iovec *parts, int count) {
    return on_file(READ, file) ? -1 : syscall(SYS_readv, file, parts, count);
}
ssize_t preadv64v2(int file, const struct iovec *parts, int count, off64_t at, int flags) {
    return on_file(READ, file) ? -1 : syscall(SYS_preadv2, file, parts, count, at, 0, flags);
}

/* On 64-bit systems, struct stat and struct stat64 are identical. */
int fstatat(int folder, const char *path, struct stat *found, int flags) {
    if (*path && on_path(STAT, folder, path)) return -1; /* "": the file `folder` itself */
    return syscall(SYS_newfstatat, folder, path, found, flags);
}
int fstatat64(int folder, const char *path, struct stat64 *found, int flags) {
    return fstatat(folder, path, (struct stat *)found, flags);
}
int stat(const char *path, struct stat *found) { return fstatat(AT_FDCWD, path, found, 0); }
int stat64(const char *path, struct stat64 *found) { return fstatat64(AT_FDCWD, path, found, 0); }
int lstat(const char *path, struct stat *found) {
    return fstatat(AT_FDCWD, path, found, AT_SYMLINK_NOFOLLOW);
}
int lstat64(const char *path, struct stat64 *found) {
    return fstatat64(AT_FDCWD, path, found, AT_SYMLINK_NOFOLLOW);
}
int __xstat(int version, const char *path, struct stat *found) { return stat(path, found); }
int __xstat64(int version, const char *path, struct stat64 *found) { return stat64(path, found); }
int __lxstat(int version, const char *path, struct stat *found) { return lstat(path, found); }
int __lxstat64(int version, const char *path, struct stat64 *found) {
    return lstat64(path, found);
}

int mkdirat(int folder, const char *path, mode_t mode) {
    return on_path(MKDIR, folder, path) ? -1 : syscall(SYS_mkdirat, folder, path, mode);
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
int unlinkat(int folder, const char *path, int flags) {
    return on_path(UNLINK, folder, path) ? -1 : syscall(SYS_unlinkat, folder, path, flags);
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
