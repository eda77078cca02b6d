/* Work divided into pieces, which are taken by the caller's thread and by those of XLA's pool that
   are free.

   Interface: the C API of XLA's foreign functions, xla/ffi/api/c_api.h, as jaxlib ships it. */

#ifndef GROKFETCH_POOL_H
#define GROKFETCH_POOL_H

#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "xla/ffi/api/c_api.h"

/* The work, and how much of it has been taken. It is the first member of a struct with what `run`
   needs; that struct comes from calloc, and its last holder frees it. */
typedef struct job {
    void (*run)(struct job *, int64_t piece);
    int64_t pieces;
    atomic_long taken, done;
    atomic_int failed, holders;
} job;

/* Takes pieces until none is left. */
static void work(job *j) {
    for (;;) {
        int64_t piece = atomic_fetch_add(&j->taken, 1);
        if (piece >= j->pieces) return;
        j->run(j, piece);
        atomic_fetch_add(&j->done, 1);
    }
}

static void release(job *j) {
    if (atomic_fetch_sub(&j->holders, 1) == 1) free(j);
}

/* What a thread of the pool runs. If it comes when all pieces have been taken, it does nothing. */
static void help(void *data) {
    work(data);
    release(data);
}

/* Waits a moment; after many times, lets another thread have the core. */
static void rest(int64_t times) {
    if (times > 4096) sched_yield();
#if defined(__x86_64__)
    else __builtin_ia32_pause();
#endif
}

/* Does all pieces, in the caller's thread if `alone`, else together with XLA's pool. True if none
   failed. */
static int completed(job *j, XLA_FFI_CallFrame *frame, int alone) {
    int64_t threads = 1;
    XLA_FFI_ThreadPool_NumThreads_Args asked = {
        .struct_size = XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE,
        .ctx = frame->ctx, .num_threads = &threads};
    XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_NumThreads(&asked);
    int64_t most = threads < j->pieces ? threads : j->pieces;
    int64_t helpers = error || alone ? 0 : most - 1;
    for (int64_t helper = 0; helper < helpers && !error; helper++) {
        XLA_FFI_ThreadPool_Schedule_Args given = {
            .struct_size = XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE,
            .ctx = frame->ctx, .task = help, .data = j};
        atomic_fetch_add(&j->holders, 1);
        error = frame->api->XLA_FFI_ThreadPool_Schedule(&given);
        if (error) atomic_fetch_sub(&j->holders, 1);
    }
    if (error) { /* Without a pool, this thread does everything. */
        XLA_FFI_Error_Destroy_Args dropped = {
            .struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, .error = error};
        frame->api->XLA_FFI_Error_Destroy(&dropped);
    }
    work(j);
    for (int64_t times = 0; atomic_load(&j->done) < j->pieces; times++) rest(times);
    return !atomic_load(&j->failed);
}

/* Whether XLA only asks for the version of a function's interface, which it is then told. */
static int introduced(XLA_FFI_CallFrame *frame) {
    /* The type is XLA_FFI_Extension_Base, and since API 0.5 XLA_FFI_InternalExtension. */
    __typeof__(frame->extension_start) extension = frame->extension_start;
    if (!extension || extension->type != XLA_FFI_Extension_Metadata) return 0;
    XLA_FFI_Metadata *told = ((XLA_FFI_Metadata_Extension *)extension)->metadata;
    told->api_version.major_version = XLA_FFI_API_MAJOR;
    told->api_version.minor_version = XLA_FFI_API_MINOR;
    told->traits = 0;
    return 1;
}

static XLA_FFI_Error *complaint(const XLA_FFI_Api *api, XLA_FFI_Error_Code code, const char *what) {
    XLA_FFI_Error_Create_Args args = {
        .struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE, .message = what, .errc = code};
    return api->XLA_FFI_Error_Create(&args);
}

#endif
