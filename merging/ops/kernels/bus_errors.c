/* A mapped file that is cut short, or whose disk fails, ends a process by SIGBUS at the next read from memory. This
   handler writes one sentence that names the file, and ends the process with exit code 1. It calls only functions that
   a signal handler may call. */

#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

static char note[512];

static void put(const char *text)
{
    if (write(2, text, strlen(text)) < 0)
        return;
}

/* Find the file that is mapped at an address; 0 where there is none. */
static int find_file(uintptr_t address, char *path, size_t room)
{
    char buffer[4096];
    uintptr_t start = 0, end = 0;
    size_t length = 0;
    int handle = open("/proc/self/maps", O_RDONLY), place = 0; /* 0: start, 1: end, 2: the rest, 3: path */
    if (handle < 0)
        return 0;
    for (ssize_t got; (got = read(handle, buffer, sizeof buffer)) > 0;)
        for (ssize_t i = 0; i < got; i++) {
            char c = buffer[i];
            int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
            if (c == '\n') {
                if (place == 3 && start <= address && address < end) {
                    path[length] = 0;
                    close(handle);
                    return 1;
                }
                start = end = length = 0;
                place = 0;
            } else if (place == 0 && digit >= 0)
                start = start * 16 + (uintptr_t)digit;
            else if (place == 1 && digit >= 0)
                end = end * 16 + (uintptr_t)digit;
            else if (place < 2)
                place++;
            else if (place == 2 && c == '/') {
                place = 3;
                path[length++] = c;
            } else if (place == 3 && length + 1 < room)
                path[length++] = c;
        }
    close(handle);
    return 0;
}

static void on_bus_error(int number, siginfo_t *information, void *context)
{
    char path[4096];
    (void)number, (void)context;
    if (!find_file((uintptr_t)information->si_addr, path, sizeof path))
        return; /* the default follows: the handler is there for one signal */
    put("error: ");
    put(path);
    put(" cannot be read any more: it was cut short during the run, or its disk fails.");
    put(note);
    put("\n");
    _exit(1);
}

int64_t report_bus_errors(const char *text)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    strncpy(note, text, sizeof note - 1);
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_RESETHAND;
    sigemptyset(&action.sa_mask);
    return sigaction(SIGBUS, &action, NULL);
}
