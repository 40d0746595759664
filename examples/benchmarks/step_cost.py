"""Cost of C2BIN's training step against the host's BYOL step: same backbone, views and optimiser.

    python examples/benchmarks/step_cost.py --host lightly [--out docs/results]
    python examples/benchmarks/step_cost.py --host solo    [--out docs/results]

A step is the host's `training_step`, backward, the optimiser, and the follower's update, on
ResNet-18 with 3 × 3 stem at 32 × 32 pixels. Both methods step alternately in one process, on random
images; the ratio is the median over rounds of C2BIN / BYOL of the same round. On the CPU it is
processor time, so that other programs disturb little; on a GPU every step is waited for.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from hardware import processor
from steps import Step, lightly_steps
from torch import Tensor

TARGET = 1.03


def solo_steps(device: torch.device) -> dict[str, Step]:
    """solo-learn's own BYOL and C2BIN, both built from the config `c2bin-cifar10`."""
    import c2bin_solo
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf
    from solo.args.pretrain import parse_cfg
    from solo.methods import METHODS

    c2bin_solo.register()
    configs = Path(c2bin_solo.__file__).parent / "configs"

    def step_of(method: str, batch: int) -> Step:
        with initialize_config_dir(str(configs), version_base="1.2"):
            cfg = compose("c2bin-cifar10", overrides=["wandb.enabled=False", "devices='1'"])
        OmegaConf.set_struct(cfg, False)
        cfg.method = method
        if method == "byol":
            kept = ("proj_hidden_dim", "proj_output_dim", "pred_hidden_dim")
            cfg.method_kwargs = {name: cfg.method_kwargs[name] for name in kept}
        torch.manual_seed(0)
        model = METHODS[method](parse_cfg(cfg)).to(device)
        model.log_dict = lambda *args, **kwargs: None  # there is no trainer to log to
        trained = [p for group in model.learnable_params for p in group["params"]]
        optimizer = torch.optim.SGD(trained, lr=0.06, momentum=0.9)
        labels = torch.randint(10, (batch,), device=device)

        def step(view0: Tensor, view1: Tensor) -> Tensor:
            optimizer.zero_grad()
            n = len(view0)
            loss: Tensor = model.training_step([None, [view0, view1], labels[:n]], 0)
            loss.backward()
            optimizer.step()
            for pair in model.momentum_pairs:
                model.momentum_updater.update(*pair)
            return loss

        return step

    return {"BYOL": step_of("byol", 8192), "C2BIN": step_of("c2bin", 8192)}


def measure(
    steps: dict[str, Step], batch: int, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Return seconds per step of each method, round by round."""
    generator = torch.Generator().manual_seed(0)
    views = torch.rand(2, batch, 3, 32, 32, generator=generator).to(device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    for index in range(rounds + 1):
        # The order turns round by round: the second of a pair finds a warmer processor.
        names = list(steps)[:: 1 if index % 2 else -1]
        for name in names:
            start = clock()
            loss = steps[name](*views)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            took = clock() - start
            if not torch.isfinite(loss.detach()):
                raise RuntimeError(f"{name}: the loss is {float(loss.detach())}")
            if index:  # the first round warms up
                seconds[name].append(took)
                print(f"round {index} of {rounds}: {name} {took:.2f} s", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", choices=("lightly", "solo"), required=True)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write step_cost_HOST.json and .md (_cuda) here")
    args = parser.parse_args()

    device = torch.device(args.device)
    warnings.filterwarnings("ignore")  # of the hosts, about a trainer that is not there
    steps = {"lightly": lightly_steps, "solo": solo_steps}[args.host](device)
    seconds = measure(steps, args.batch_size, args.rounds, device)
    ratios = [c / b for b, c in zip(seconds["BYOL"], seconds["C2BIN"], strict=True)]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    settings = {
        "command": shlex.join(["python", "examples/benchmarks/step_cost.py", *sys.argv[1:]]),
        "host": args.host,
        "torch": torch.__version__,
        "device": processor(device),
        "threads": torch.get_num_threads(),
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "python": platform.python_version(),
    }
    results = {
        "seconds": seconds,
        "median_seconds": medians,
        "ratios": ratios,
        "median_ratio": statistics.median(ratios),
        "target": TARGET,
    }
    table = (
        "| host | BYOL, s a step | C2BIN, s a step | ratio | lowest and highest |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        f"| {args.host} | {medians['BYOL']:.4f} | {medians['C2BIN']:.4f} "
        f"| {results['median_ratio']:.3f} | {min(ratios):.3f} to {max(ratios):.3f} |\n"
    )
    print(f"{table}\nThe ratio is to be at most {TARGET}.")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        stem = f"step_cost_{args.host}" + ("_cuda" if device.type == "cuda" else "")
        (args.out / f"{stem}.md").write_text(table)
        report = {"settings": settings, "results": results}
        (args.out / f"{stem}.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
