// Frames of the data plane on sockets that do not block. `workers/transport/frames.py` is the
// reference of their form; whatever is not as expected here is left to `workers/transport`.
#ifndef FRAMES_H
#define FRAMES_H

#include <stdint.h>

enum { HEADER_BYTES = 36, FRAME_PARTS = 2 };
enum frame_kind { ROWS = 3, OUTPUTS = 4 };

// The step of a frame. Fields of `StepFields` in frames.py; all below have theirs.
struct step {
    int64_t generation, number, flags;
};

// What the headers of the frames of one exchange share.
struct place {
    const struct step *step;
    int64_t bank, exchange, micro_batch;
};

// A frame to or from one peer.
struct frame {
    int64_t socket;
    int64_t counts[FRAME_PARTS];  // rows of each part; all 0: there is no frame
    int64_t bytes[FRAME_PARTS];
    char *parts[FRAME_PARTS];
    int64_t done;   // bytes of header and parts that were sent or received
    int64_t error;  // errno; END_OF_STREAM; 0: none
    uint8_t header[HEADER_BYTES];
};

enum { END_OF_STREAM = -1 };

// Where to wait.
struct waiting {
    int64_t epoll;  // watches the sockets for reading, and all else that ends the wait
    int64_t wake;   // one that it watches and that does not end the wait: it is read to its end
    int64_t limit_ms;
    int64_t spin_ns;  // how long to look at the sockets again and again before that
};

// Send frames as far as the system takes them; 1: all of them, whole.
int frames_send(struct frame *frames, int64_t count, enum frame_kind kind,
                const struct place *place);

// Receive frames; 1: all of them came, as their counts and bytes say. 0 where a peer sent something
// else or is lost, anything else happened, or the time is over: `header` and `parts` have what came.
int frames_receive(struct frame *frames, int64_t count, enum frame_kind kind,
                   const struct place *place, const struct waiting *waiting);

#endif
