#define _GNU_SOURCE
#include "frames.h"

#include <errno.h>
#include <immintrin.h>
#include <poll.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "clock.h"

enum { MAX_EVENTS = 16 };

// Write a number in big-endian order.
static uint8_t *put(uint8_t *to, uint64_t number, int num_bytes) {
    for (int i = num_bytes - 1; i >= 0; i--) *to++ = (uint8_t)(number >> 8 * i);
    return to;
}

static void write_header(uint8_t *to, const struct frame *frame, enum frame_kind kind,
                         const struct place *place) {
    memcpy(to, "EMdp\1", 5);
    to = put(to + 5, (uint64_t)kind, 1);
    to = put(to, (uint64_t)place->step->generation, 4);
    to = put(to, (uint64_t)place->step->number, 8);
    to = put(to, (uint64_t)place->step->flags, 1);
    to = put(to, (uint64_t)place->bank, 2);
    to = put(to, (uint64_t)place->exchange, 1);
    to = put(to, (uint64_t)place->micro_batch, 1);
    for (int i = 0; i < FRAME_PARTS; i++) to = put(to, (uint64_t)frame->counts[i], 4);
    to = put(to, (uint64_t)(frame->bytes[0] + frame->bytes[1]), 4);
    put(to, 0, 1);
}

static int is_there(const struct frame *frame) { return frame->counts[0] || frame->counts[1]; }

static int64_t size_of(const struct frame *frame) {
    return HEADER_BYTES + frame->bytes[0] + frame->bytes[1];
}

// Fill `pieces` with the memory of a frame from `done` on; return the number of pieces.
static int pieces_of(struct frame *frame, struct iovec *pieces) {
    char *bases[] = {(char *)frame->header, frame->parts[0], frame->parts[1]};
    int64_t sizes[] = {HEADER_BYTES, frame->bytes[0], frame->bytes[1]};
    int64_t skipped = frame->done;
    int count = 0;
    for (int i = 0; i <= FRAME_PARTS; i++) {
        int64_t from = skipped < sizes[i] ? skipped : sizes[i];
        skipped -= from;
        if (from == sizes[i]) continue;
        pieces[count++] = (struct iovec){bases[i] + from, (size_t)(sizes[i] - from)};
    }
    return count;
}

int frames_send(struct frame *frames, int64_t count, enum frame_kind kind,
                const struct place *place) {
    int is_whole = 1;
    for (struct frame *frame = frames; frame < frames + count; frame++) {
        frame->done = frame->error = 0;
        if (!is_there(frame)) continue;
        write_header(frame->header, frame, kind, place);
        struct iovec pieces[1 + FRAME_PARTS];
        struct msghdr message = {.msg_iov = pieces};
        message.msg_iovlen = (size_t)pieces_of(frame, pieces);
        ssize_t sent = sendmsg((int)frame->socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent >= 0) frame->done = sent;
        else if (errno != EAGAIN && errno != EINTR) frame->error = errno;
        is_whole &= frame->done == size_of(frame);
    }
    return is_whole;
}

enum arrival { NOTHING, SOMETHING, WHOLE, UNEXPECTED };

static enum arrival receive_some(struct frame *frame, enum frame_kind kind,
                                 const struct place *place) {
    int64_t before = frame->done;
    struct iovec pieces[1 + FRAME_PARTS];
    struct msghdr message = {.msg_iov = pieces};
    message.msg_iovlen = (size_t)pieces_of(frame, pieces);
    ssize_t got = recvmsg((int)frame->socket, &message, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return NOTHING;
    if (got <= 0) {
        frame->error = got ? errno : END_OF_STREAM;
        return UNEXPECTED;
    }
    frame->done += got;
    if (before < HEADER_BYTES && frame->done >= HEADER_BYTES) {
        uint8_t expected[HEADER_BYTES];
        write_header(expected, frame, kind, place);
        if (memcmp(frame->header, expected, HEADER_BYTES)) return UNEXPECTED;
    }
    return frame->done == size_of(frame) ? WHOLE : SOMETHING;
}

static int is_missing(const struct frame *frame) {
    return is_there(frame) && frame->done < size_of(frame);
}

// Sleep for at most a millisecond, until data of a missing frame arrives.
static void wait_for_missing(const struct frame *frames, int64_t count) {
    struct pollfd missing[count];
    nfds_t num_missing = 0;
    for (const struct frame *frame = frames; frame < frames + count; frame++)
        if (is_missing(frame)) missing[num_missing++] = (struct pollfd){(int)frame->socket, POLLIN, 0};
    poll(missing, num_missing, 1);
}

// Sleep until a socket is readable. Returns 1 if it is a socket of the frames' peers, or a wake-up,
// which is handled after the step; 0 otherwise. A peer with a complete frame may already have sent
// the frame of its next micro-batch: `early_ms` counts the time with only such data.
static int wait_for(const struct frame *frames, int64_t count, const struct waiting *waiting,
                    int64_t *early_ms) {
    struct epoll_event events[MAX_EVENTS];
    int ready = epoll_wait((int)waiting->epoll, events, MAX_EVENTS, (int)waiting->limit_ms);
    int num_early = 0;
    for (int i = 0; i < ready; i++) {
        char bytes[64];
        int fd = events[i].data.fd, is_expected = fd == waiting->wake, is_early = 0;
        while (is_expected && recv(fd, bytes, sizeof bytes, MSG_DONTWAIT) > 0) {}
        for (const struct frame *frame = frames; frame < frames + count; frame++) {
            if (!is_there(frame) || frame->socket != fd) continue;
            if (is_missing(frame)) is_expected = 1;
            else is_early = recv(fd, bytes, 1, MSG_PEEK | MSG_DONTWAIT) > 0;  // false: it has closed
        }
        if ((!is_expected && !is_early) || events[i].events != EPOLLIN) return 0;
        num_early += is_early;
    }
    if (ready < 1 || num_early < ready) return ready > 0;
    wait_for_missing(frames, count);
    return (*early_ms)++ < waiting->limit_ms;
}

int frames_receive(struct frame *frames, int64_t count, enum frame_kind kind,
                   const struct place *place, const struct waiting *waiting) {
    for (int64_t i = 0; i < count; i++) frames[i].done = frames[i].error = 0;
    int64_t sleep_ns = now_ns() + waiting->spin_ns, early_ms = 0;
    for (;;) {
        int is_whole = 1, has_more = 0;
        for (struct frame *frame = frames; frame < frames + count; frame++) {
            if (!is_missing(frame)) continue;
            enum arrival arrival = receive_some(frame, kind, place);
            if (arrival == UNEXPECTED) return 0;
            is_whole &= arrival == WHOLE;
            has_more |= arrival == SOMETHING;
        }
        if (is_whole) return 1;
        if (has_more) continue;
        if (waiting->spin_ns && now_ns() < sleep_ns) _mm_pause();
        else if (!wait_for(frames, count, waiting, &early_ms)) return 0;
    }
}
