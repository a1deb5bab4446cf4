"""llama.cpp's own HTTP server, from the package xllamacpp, which has no command for it."""

import signal
import sys

import xllamacpp


def main(gguf: str, port: int, slots: int, context: int) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_parallel = slots
    params.n_ctx = slots * context
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
