"""A deterministic simulation of a whole cluster: product code on a virtual network, clock and Ray.

The controller actor, the workers' runtimes, their engines and data planes, and the gateways'
engine streams run as they are. Replaced are the operating system (time, sockets, threads), Ray,
gRPC, and the model: a toy whose tokens tell whether every step read the right experts. One seed
decides the order of everything, the requests and the faults.

    python -m tests.simulation --seed 7            run one seed again, with the events
    python -m tests.simulation --seed 0 --num 500  run many, print those that fail
"""
