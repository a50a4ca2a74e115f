"""What ranks tell each other, in real processes; started by test_data_exchange.py with four ranks in two replicas."""

import sys
import threading
import time

import pytest
import torch.distributed as dist

from laver_mcore.data.errors import DataError
from laver_mcore.data.serve.exchange import Closed, connect


def main(last: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    replicas = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    exchange = connect(replicas[rank // 2])
    assert exchange.reads == (rank % 2 == 0)

    calls = []

    def read(step):
        calls.append(step)
        return {"from": rank, "tokens": list(range(1000 * step))}

    for step in range(5):
        got = exchange.from_first_rank(lambda step=step: read(step))
        assert got == {"from": rank // 2 * 2, "tokens": list(range(1000 * step))}
        assert exchange.gather(None) == []
        assert exchange.gather(f"{rank}" * rank if rank in (1, 3) else None) == ["1", "333"]
    assert calls == (list(range(5)) if rank % 2 == 0 else [])

    def broken():
        raise DataError(f"rank {rank} cannot read")

    with pytest.raises(DataError, match=f"rank {rank // 2 * 2} cannot read"):
        exchange.from_first_rank(broken)

    # The data threads run beside collectives of the training step, on groups of their own.
    thread = threading.Thread(target=lambda: [exchange.gather(None) for _ in range(50)])
    thread.start()
    for _ in range(50):
        dist.barrier()
    thread.join(60)
    assert not thread.is_alive()

    if last == "close" and rank == 0:  # nobody else comes
        timer = threading.Timer(0.5, exchange.close)
        timer.start()
        with pytest.raises(Closed):
            exchange.gather("anything")
    elif last == "leave" and rank != 0:  # rank 0 ends without a word
        with pytest.raises(DataError, match="another rank left the run"):
            exchange.gather(None)
    if last == "close":
        dist.barrier()
    elif rank == 0:
        time.sleep(1.0)
    print(f"rank {rank} is done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
