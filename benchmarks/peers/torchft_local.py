"""torchft's LocalSGD or DiLoCo, as in its `train_diloco.py`: a lighthouse, a manager a replica."""

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import TCPStore
from torchft.local_sgd import DiLoCo, LocalSGD
from torchft.manager import Manager
from torchft.process_group import ProcessGroupGloo

import local_start

LIGHTHOUSE_PORT, STORE_PORT = 29510, 29520

given = local_start.arguments()
kind, outer_lr, outer_momentum = os.environ["BENCH_KIND"].split()
address = os.environ["BENCH_ADDRESS"]
first = os.environ["MASTER_ADDR"]
lighthouse = None
if given.rank == 0:
    program = Path(sys.executable).with_name("torchft_lighthouse")
    options = ["--min_replicas", "2", "--join_timeout_ms", "10000", "--quorum_tick_ms", "20"]
    command = [program, "--bind", f"0.0.0.0:{LIGHTHOUSE_PORT}", *options]
    lighthouse = subprocess.Popen(command, stdout=sys.stderr)
time.sleep(2.0)
store = TCPStore(address, STORE_PORT, is_master=True, wait_for_workers=False)
model = local_start.build()
optimizer = local_start.sgd(model.parameters())
long = timedelta(seconds=120)
manager = Manager(
    pg=ProcessGroupGloo(timeout=long),
    min_replica_size=2,
    load_state_dict=model.load_state_dict,
    state_dict=model.state_dict,
    use_async_quorum=False,
    timeout=long,
    quorum_timeout=long,
    rank=0,
    world_size=1,
    store_addr=address,
    store_port=STORE_PORT,
    lighthouse_addr=f"http://{first}:{LIGHTHOUSE_PORT}",
    replica_id=f"replica_{given.rank}",
    hostname=address,
    init_sync=False,
)
if kind == "local":
    way = LocalSGD(manager, model, optimizer, given.every)
else:
    lr, momentum = float(outer_lr), float(outer_momentum)
    outer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, nesterov=momentum > 0)
    way = DiLoCo(manager, [model], optimizer, outer, given.every, pin_memory=False,
                 use_bucketization=kind == "diloco-buckets")  # fmt: skip
with way:
    rate = local_start.trained(given, model, optimizer)
local_start.report(given, model, rate, meetings=manager.current_step())
time.sleep(1.0)
manager.shutdown(wait=False)
if lighthouse is not None:
    time.sleep(1.0)
    lighthouse.kill()
sys.stdout.flush()
os._exit(0)  # its threads do not end
