"""Train the MLP of a deep-learning course on scikit-learn's digits, with torch.nn and then with fastnn.

Both runs start from the same weights and see the same batches; only the library that Sequential and optimizer are from
differs. The weights of the epoch with the best validation accuracy are restored before the one look at the test part.
The report, curves and confusion matrix, goes to digits.png. `--optimizer all` trains with every optimizer in turn.
After each epoch digits.pt has all that is needed to go on: `--resume` does so, after Ctrl-C or whatever else.
`--graph` replays the whole step as one CUDA graph, where layers as small as these wait for the host.

    $ python examples/digits.py
    implementation   test accuracy %   test loss    F1 %   epochs   step ms   kernels
    ─────────────────────────────────────────────────────────────────────────────────
    torch.nn                   97.78      0.0747   97.77       40       ...         -
    fastnn.nn                  97.78      0.0747   97.77       40       ...         -
    Ran on cpu; fastnn's path there: eager (no kernels for cpu tensors)
"""

import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from statistics import mean, median
from typing import Any

import torch
from arguments import make_parser, parse, settings_of
from recipe import TRAIN, Data, augment, load
from report import Monitor, Progress, draw, make_table
from rich import print
from runs import Checkpoint, Run, random_states
from sklearn.metrics import f1_score
from torch import Tensor, nn

from fastnn import dispatch

WARM_UP = 3  # steps before a capture: kernels are loaded in them, and the optimizer's state is made


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float, Tensor]:
    """Accuracy in per cent, mean cross-entropy, and the predicted classes."""
    logits = model.eval()(x)
    predicted = logits.argmax(1)
    return 100 * (predicted == y).float().mean().item(), nn.functional.cross_entropy(logits, y).item(), predicted


def graphed(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step as one CUDA graph, captured at the fourth call; its result is overwritten by the next replay's.

    The calls before are the warm-up that a capture needs, on a side stream. They train as the step alone would, and a
    capture computes nothing, so that nothing has to be put back and every batch counts once.
    """
    warnings.filterwarnings("ignore", ".* running without .* graph capture")  # torch's optimizers, of the warm-up

    def results() -> Iterator[Tensor]:
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        for _ in range(WARM_UP):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                result = step()
            torch.cuda.current_stream().wait_stream(side)
            yield result
        with torch.cuda.graph(graph):
            result = step()
        while True:
            graph.replay()
            yield result

    return results().__next__


def make_step(run: Run, images: Tensor, labels: Tensor) -> Callable[[Tensor], tuple[float, float]]:
    """One step of training on the given rows of images and labels: its loss, and the milliseconds it took."""
    args, model, optimizer = run.args, run.model, run.optimizer
    parameters = list(model.parameters())
    rows = torch.zeros(args.batch_size, dtype=torch.int64, device=images.device)  # where a graph reads them

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
        if args.l1:
            loss = loss + args.l1 * sum(parameter.abs().sum() for parameter in parameters)
        loss.backward()
        if args.clip_norm:
            run.library.nn.utils.clip_grad_norm_(parameters, args.clip_norm)
        if args.clip_value:
            nn.utils.clip_grad_value_(parameters, args.clip_value)
        optimizer.step()
        return loss.detach()

    call = graphed(step) if args.graph else step

    def timed_step(batch: Tensor) -> tuple[float, float]:
        start = time.perf_counter()
        rows.copy_(batch)
        return call().item(), 1000 * (time.perf_counter() - start)  # item() waits for the whole step on a GPU

    return timed_step


def count_kernels(step: Callable[[], Any]) -> str:
    """What the GPU runs in a forward, backward and update, without copies and fills."""
    with torch.profiler.profile() as profile:
        step()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return str(sum(not e.is_user_annotation and not e.name.startswith(("Memcpy", "Memset")) for e in events))


def train(run: Run, data: Data, after_epoch: list[Callable[[], None]]) -> None:
    """Trains until the last epoch, or as long as validation gets better; calls all of `after_epoch` after each."""
    args, history, (x, y) = run.args, run.history, data.train
    torch.set_rng_state(run.random[0])
    if x.is_cuda:
        torch.cuda.set_rng_state(run.random[1], args.device)
    images = x.clone()
    step = make_step(run, images, y)
    per_batch = isinstance(run.schedule, torch.optim.lr_scheduler.OneCycleLR)
    while run.goes_on():
        run.model.train()
        if args.noise or args.shift:
            images.copy_(augment(x, data.centre, args.noise, args.shift, run.shuffle))
        batches = torch.randperm(TRAIN, generator=run.shuffle).to(x.device).split(args.batch_size)
        rate, steps = float(run.optimizer.param_groups[0]["lr"]), []
        for batch in batches[: TRAIN // args.batch_size]:  # without an incomplete one at the end
            steps.append(step(batch))
            if per_batch:
                run.schedule.step()
        accuracy, loss, _ = evaluate(run.model, *data.validation)
        if not per_batch:
            plateau = isinstance(run.schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
            run.schedule.step(*[loss] * plateau)
        history["loss"].append(mean(loss for loss, _ in steps))
        history["lr"].append(rate)  # of the first step
        history["ms"] += [milliseconds for _, milliseconds in steps]
        history["accuracy"].append(accuracy)
        history["validation loss"].append(loss)
        if [accuracy, -loss] > run.best[:2]:  # of equal accuracies, the lower loss
            run.best = [accuracy, -loss, run.epochs]
            run.weights = {key: value.clone() for key, value in run.model.state_dict().items()}
        run.random = random_states(args.device)
        for call in after_epoch:
            call()
    if x.is_cuda:
        run.model.train()
        run.kernels = count_kernels(lambda: step(torch.arange(args.batch_size, device=x.device)))
    run.model.load_state_dict(run.weights)
    run.finished = True


def report(run: Run, x: Tensor, y: Tensor) -> list[str]:
    """The one look at the test part: cells of the table."""
    accuracy, loss, predicted = evaluate(run.model, x, y)
    run.answers = (y.tolist(), predicted.tolist())
    f1 = 100 * f1_score(*run.answers, average="macro")
    epochs = str(run.epochs)
    return [f"{accuracy:.2f}", f"{loss:.4f}", f"{f1:.2f}", epochs, f"{median(run.history['ms']):.3f}", run.kernels]


def fit(run: Run, name: str, data: Data, checkpoint: Checkpoint) -> None:
    with Progress(run, name) as progress, Monitor(run, name) as monitor:
        train(run, data, [progress.show, monitor.write, lambda: checkpoint.save(name, run)])
    checkpoint.save(name, run)


def main() -> None:
    parser = make_parser((__doc__ or "").split("\n")[0])
    args = parse(parser)
    torch.set_num_threads(1)  # layers this small gain nothing from more, and on a busy CPU lose by it
    if args.device != "cpu":
        torch.cuda.set_device(torch.device(args.device).index or 0)  # where streams and graphs are made
    runs = {(name, library): Run(name, library, args) for name in args.optimizer for library in args.library}
    try:
        checkpoint = Checkpoint(args.checkpoint, settings_of(args), args.resume)
        for names, run in runs.items():
            checkpoint.give(" ".join(names), run)
    except ValueError as error:
        parser.error(f"argument --checkpoint: {error}")
    try:
        data = load(args.seed, args.device)
        for names, run in runs.items():
            if not run.finished:
                fit(run, " ".join(names), data, checkpoint)
        checkpoint.finish()
        print(make_table({names: report(run, *data.test) for names, run in runs.items()}, len(args.optimizer) > 1))
        draw(runs, args)
    except KeyboardInterrupt:
        again = shlex.join(["python", *(argument for argument in sys.argv if argument != "--resume"), "--resume"])
        kept = f"{args.checkpoint} has the last whole epoch. Go on: {again}"
        sys.stderr.write(f"Interrupted: {kept if checkpoint.saved else 'no epoch was over, so nothing is kept'}\n")
        sys.exit(130)
    path = dispatch.device_path(torch.device(args.device))
    steps = ", each step one CUDA graph" * args.graph
    print(f"Ran on {args.device}{steps}; fastnn's path there: {path.name}" + f" ({path.reason})" * path.eager)


if __name__ == "__main__":
    main()
