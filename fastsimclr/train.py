"""Pre-train an encoder with SimCLR: `python -m fastsimclr.train`, alone or under torchrun.

Exit codes: 0 done, or stopped by SIGTERM or SIGINT with what was done kept; 2 a user's mistake, in one line; 1 an
internal error.
"""

import os
import signal
import sys
from collections.abc import Sequence

from fastsimclr import distributed
from fastsimclr.config import parse
from fastsimclr.data.scan import ScanStopped
from fastsimclr.errors import UserError
from fastsimclr.malloc import keep_freed_memory
from fastsimclr.training.rank_sync import STOP_SIGNALS
from fastsimclr.training.trainer import Trainer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        config, text = parse(arguments)
        world = distributed.start(config.device)
        if world.device.type == "cpu":
            keep_freed_memory()
        Trainer(config, text, world, arguments).train()
        return 0
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"fastsimclr.train: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except ScanStopped:
        return 0
    finally:
        distributed.stop()
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
