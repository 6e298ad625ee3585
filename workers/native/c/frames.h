// Frames of the data plane on nonblocking sockets. `workers/transport/frames.py` is the reference of
// the format; `workers/transport` handles all unexpected cases.
#ifndef FRAMES_H
#define FRAMES_H

#include <stdint.h>

enum { HEADER_BYTES = 36, FRAME_PARTS = 2 };
enum frame_kind { ROWS = 3, OUTPUTS = 4 };

// Generation and step of a frame. Each struct here has a `...Fields` class in frames.py.
struct step {
    int64_t generation, number, flags;
};

// Header fields that all frames of one exchange share.
struct place {
    const struct step *step;
    int64_t bank, exchange, micro_batch;
};

// A frame to or from one peer.
struct frame {
    int64_t socket;
    int64_t counts[FRAME_PARTS];  // rows of each part; all 0: no frame
    int64_t bytes[FRAME_PARTS];
    char *parts[FRAME_PARTS];
    int64_t done;   // bytes of header and parts that were sent or received
    int64_t error;  // errno; END_OF_STREAM; 0: none
    uint8_t header[HEADER_BYTES];
};

enum { END_OF_STREAM = -1 };

// Parameters of waits.
struct waiting {
    int64_t epoll;  // watches the sockets for reading, and all other events that end a wait
    int64_t wake;   // a watched pipe that does not end the wait: it is emptied
    int64_t limit_ms;
    int64_t spin_ns;  // time for which the sockets are polled before the thread sleeps
};

// Send frames as far as the system accepts them; return 1 if all were sent completely.
int frames_send(struct frame *frames, int64_t count, enum frame_kind kind,
                const struct place *place);

// Receive frames; return 1 if all arrived with the expected counts and sizes. Return 0 if a peer sent
// different data or is lost, after any other event, or after the time limit: `header` and `parts`
// then have the received data.
int frames_receive(struct frame *frames, int64_t count, enum frame_kind kind,
                   const struct place *place, const struct waiting *waiting);

#endif
