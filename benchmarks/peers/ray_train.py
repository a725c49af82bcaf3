"""Ray Train, as in "Get started with distributed training using PyTorch": two workers."""

import os
import sys
import tempfile
from pathlib import Path

import ray
import ray.train
import ray.train.torch
import torch
from torch.nn import functional
from torch.utils.data import DataLoader

import loaded


def train(config: dict) -> None:
    os.environ["BENCH_STARTED"] = config["started"]
    sys.argv = config["arguments"]
    work = loaded.work()
    context = ray.train.get_context()
    model = ray.train.torch.prepare_model(work.model)
    share = work.batch // context.get_world_size()
    loader = DataLoader(work.train, batch_size=share, shuffle=True)
    loader = ray.train.torch.prepare_data_loader(loader)
    optimizer = torch.optim.AdamW(model.parameters(), lr=work.lr)
    clock = loaded.Clock(work)
    while clock.runs:
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            clock.step(loss)
            if not clock.runs:
                break
    if context.get_world_rank() == 0:
        clock.report(work.model, config["result"])


with tempfile.TemporaryDirectory() as folder:
    os.chdir(os.environ["BENCH_ROOT"])
    ray.init(
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=f"{folder}/ray",
        _node_ip_address="127.0.0.1",
    )
    config = {
        "started": os.environ["BENCH_STARTED"],
        "arguments": sys.argv,
        "result": f"{folder}/result.json",
    }
    trainer = ray.train.torch.TorchTrainer(
        train,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(num_workers=2, use_gpu=False),
        run_config=ray.train.RunConfig(storage_path=f"{folder}/results"),
    )
    trainer.fit()
    print(Path(config["result"]).read_text())
    ray.shutdown()
