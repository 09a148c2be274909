"""`make demo`: the main job, end to end, on real parts. Exit status 0 only if every check held.

The last line on standard output is JSON with the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import psutil
from rich.console import Console
from rich.progress import Progress

from examples.demo import models, picture, report
from examples.demo.traffic import AmqpTraffic, Answer, Book, HttpTraffic, quantile
from examples.demo.watch import Watcher
from roost.client import RoostClient
from roost.commands.up import make_stack
from roost.stack.port import Stack, StackConfig, StackFailed
from shared import logs
from shared.errors import RoostError
from shared.units import show_bytes

MEMORY_BYTES, DISK_BYTES = 8 * 10**9, 5 * 10**9
ROWS = 8
"""Sentences whose right answers are kept for each model."""
QUIET_S, SPIKE_S, AFTER_S = 10.0, 12.0, 6.0
OTHERS_PER_SECOND = 20.0
WORKSPACE_BYTES = 32 * 2**20
"""Room in the budget for one batch's intermediate tensors, beside the weights."""

BORNE_S = 0.5
"""What half of a spike's requests take at most, in its second half, where two workers bear it."""
LAST_USED_S = 2.0
"""Long enough ago that every model counts as idle, and a newcomer may take somebody's place."""

# Where there is no terminal to fit in (a log, CI), lines are as long as the tables need.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


class Checks:
    """What must hold; says so at once, and remembers what did not."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def hold(self, condition: bool, claim: str) -> None:
        if condition:
            console.print(f"  [green]✓[/] {claim}")
        else:
            console.print(f"  [bold red]✗[/] {claim}")
            self.failed.append(claim)


class Result(msgspec.Struct):
    """The last line. `None`: did not come so far."""

    registered: int = 0
    served: int = 0
    wrong: int = 0
    workers: int = 0
    resident_bytes: int = 0
    budget_bytes: int = 0
    spike: dict[str, object] = {}
    evicted_for_newcomer: str | None = None


class Demo:
    """The run, step by step. Each step leaves what the next one needs in attributes."""

    def __init__(self, folder: Path, png: Path, arguments: argparse.Namespace, seed: int) -> None:
        self.folder, self.png, self.embedded = folder, png, arguments.embedded
        self.registered, self.to_draw = arguments.registered, arguments.drawn
        self.random = random.Random(seed)  # noqa: S311 - a reproducible draw
        self.names = [f"minilm-{number:03d}" for number in range(self.registered)]
        self.drawn = sorted(self.random.sample(self.names, self.to_draw))
        self.checks = Checks()
        self.result = Result()

    async def run(self) -> None:
        # 1. A first fine-tune tells how large the device must be; then the stack comes up.
        console.print("[bold]1. Start[/] — RabbitMQ, Redis, gateway, placer, one worker")
        self.factory = await asyncio.to_thread(models.Factory)
        self.book = Book({k: v[:ROWS] for k, v in self.factory.inputs.items()})
        stack = await self.start_stack()
        watcher = Watcher(stack.placer_url)
        http = HttpTraffic(stack.gateway_url, self.book)
        watching = asyncio.create_task(watcher.run())
        try:
            # 2. to 6. The job.
            await self.register(stack)
            await self.serve_sixty(http, watcher)
            spiker = await self.spike(stack, http, watcher)
            await self.newcomer(stack, http, watcher, spiker.model)
            self.show(watcher, spiker)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await http.close()
            await watcher.close()
            console.print("stopping …")
            await stack.close()

    async def start_stack(self) -> Stack:
        probe = self.folder / "probe.pt"
        await asyncio.to_thread(self.factory.make, 0, probe)
        self.weights_bytes = probe.stat().st_size
        probe.unlink()
        # The reference's card to scale: sixty of these models and the room to run one of them.
        self.budget = self.to_draw * self.weights_bytes + WORKSPACE_BYTES
        self.result.budget_bytes = self.budget
        stack = make_stack(
            StackConfig(data_dir=self.folder, workers=1, budget_bytes=self.budget, device="cpu"),
            embedded=self.embedded,
        )
        try:
            await stack.start()
        except BaseException:
            await stack.close()
            raise
        self.worker = "worker-0"
        console.print(
            f"  gateway {stack.gateway_url}, one worker with a budget of {show_bytes(self.budget)}"
            + (" (embedded: in-memory broker and store)" if self.embedded else "")
        )
        return stack

    async def register(self, stack: Stack) -> None:
        console.print(
            f"[bold]2. Register[/] — {self.registered} fine-tunes of all-MiniLM-L6-v2, "
            f"{show_bytes(self.weights_bytes)} each, no two with a tensor in common"
        )
        digests = set()
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("  making and pushing", total=self.registered)
            for number, name in enumerate(self.names):
                digests.add(await asyncio.to_thread(self._push, stack.gateway_url, number, name))
                progress.advance(task)
                if not console.is_terminal and (number + 1) % 20 == 0:
                    console.print(f"  {number + 1} registered")
        self.result.registered = len(digests)
        self.checks.hold(
            len(digests) == self.registered, f"{len(digests)} different models registered"
        )
        vectors = [self.book.expected[name][0] for name in self.names]
        apart = min(
            models.difference(vectors[a][None], vectors[b][None])
            for a in range(len(vectors))
            for b in range(a)
        )
        self.checks.hold(
            apart > 0.2, f"their answers differ by {apart:.2f} or more, so a mix-up would show"
        )

    def _push(self, url: str, number: int, name: str) -> str:
        path = self.folder / "fine-tune.pt"
        self.factory.make(number, path)
        self.book.expected[name] = self.factory.expect(range(ROWS))
        with RoostClient(url) as client:
            manifest = client.push(name, path, spec=models.SPEC)
        path.unlink()
        return manifest.digest

    async def serve_sixty(self, http: HttpTraffic, watcher: Watcher) -> None:
        console.print(
            f"[bold]3. Serve[/] — {self.to_draw} of them, drawn at random, are sent real sentences"
        )
        begun = time.monotonic()
        order = self.random.sample(self.drawn, self.to_draw)
        first: list[Answer] = []
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("  asking for the first time", total=self.to_draw)
            for name in order:
                first.append(await http.ask(name, 0))
                progress.advance(task)
        for row in range(1, 3):
            for name in order:
                await http.ask(name, row)
        sight = await watcher.until(lambda s: len(s.resident(self.worker)) >= self.to_draw, 10)
        self.filled = begun, time.monotonic()
        sight = sight or watcher.sights[-1]
        resident = sight.resident(self.worker)
        self.result.served = len({a.model for a in self.book.all() if not a.error})
        self.result.resident_bytes = sight.used_bytes[self.worker]
        self._no_errors(self.book.all())
        self.checks.hold(
            resident == set(self.drawn),
            f"one engine process holds all {len(resident)} of {self.to_draw}: "
            f"{show_bytes(sight.used_bytes[self.worker])} measured, "
            f"{show_bytes(self.budget)} budget; nobody named them",
        )
        cold = [a.seconds for a in first]
        console.print(
            f"  first answer of a cold model: p50 {quantile(cold, 0.5) * 1000:.0f} ms, "
            f"slowest {max(cold) * 1000:.0f} ms; all in {self.filled[1] - begun:.0f} s"
        )

    async def spike(self, stack: Stack, http: HttpTraffic, watcher: Watcher) -> picture.Spike:
        model = self.random.choice(self.drawn)
        others = [name for name in self.drawn if name != model]
        rate = await asyncio.to_thread(self._spike_rate)
        await stack.add_worker()
        self.result.workers = 2
        console.print(
            f"[bold]4. Spike[/] — a second worker has joined; a producer publishes "
            f"{rate:.0f} requests/s for {model} to RabbitMQ"
        )
        amqp = AmqpTraffic(await stack.producer(), self.book)
        await amqp.start()
        background = asyncio.create_task(http.keep_asking(others, OTHERS_PER_SECOND, ROWS))
        trickle = asyncio.create_task(http.keep_asking([model], OTHERS_PER_SECOND / 10, ROWS))
        watched_from = time.monotonic()
        await asyncio.sleep(QUIET_S)
        before = watcher.sights[-1].bound()
        began = time.monotonic()
        second = asyncio.create_task(
            watcher.until(lambda s: len(s.bound().get(model, ())) >= 2, SPIKE_S + 20)
        )
        await amqp.spike(model, rate, SPIKE_S, ROWS)
        ended = time.monotonic()
        at_two = await second
        back = await watcher.until(lambda s: len(s.bound().get(model, ())) == 1, 60)
        await asyncio.sleep(AFTER_S)
        seen = picture.Spike(
            model=model,
            watched_from=watched_from,
            began=began,
            second_binding=at_two.at if at_two else None,
            ended=ended,
            given_back=back.at if back else None,
            watched_to=time.monotonic(),
        )
        for task in (background, trickle):
            task.cancel()
        await asyncio.gather(background, trickle, return_exceptions=True)
        await amqp.close()
        self._judge(seen, before, watcher, set(others))
        return seen

    def _judge(
        self,
        spike: picture.Spike,
        before: dict[str, set[str]],
        watcher: Watcher,
        others: set[str],
    ) -> None:
        """Figures and checks of the spike. `before`: workers by bound model when it began."""
        during = [s.bound() for s in watcher.sights if spike.began <= s.at <= spike.watched_to]
        changed = sorted(
            {m for bound in during for m in {*bound, *before} if bound.get(m) != before.get(m)}
        )
        phases = {
            "before": (spike.watched_from, spike.began),
            "during": (spike.began, spike.ended),
            "after": (spike.watched_to - AFTER_S, spike.watched_to),
        }
        p99 = {
            name: quantile([a.seconds for a in self.book.between(*span, others)], 0.99)
            for name, span in phases.items()
        }
        half = (spike.began + spike.ended) / 2
        late = self.book.between(half, spike.ended, {spike.model})
        borne = quantile([a.seconds for a in late], 0.5) <= BORNE_S
        waited = spike.second_binding and round(spike.second_binding - spike.began, 3)
        self.result.spike = {
            "models_whose_bindings_changed": changed,
            "seconds_to_second_binding": waited,
            "others_p99_ratio": round(p99["during"] / p99["before"], 2),
            "borne": borne,
        }
        self._no_errors(self.book.all())
        self.checks.hold(waited is not None, f"{spike.model} got a second binding after {waited} s")
        told = f"bindings changed of {', '.join(changed) or 'nobody'}, and of no other"
        if borne or changed == [spike.model]:
            self.checks.hold(changed == [spike.model], told)
        else:  # neighbours leave a worker that stays too hot (docs/placement.md)
            told = told.removesuffix(", and of no other")
            console.print(
                f"  [yellow]![/] {told}: this machine was too busy for two workers to bear it"
            )
        self.checks.hold(
            spike.given_back is not None,
            "the second binding was given back "
            f"{(spike.given_back or float('nan')) - spike.ended:.1f} s after the spike",
        )
        console.print(report.spike(self.book, spike.model, others, phases))

    def _spike_rate(self) -> float:
        """Requests per second that keep one engine busy two thirds of the time at the batches
        it would form at best: more than one worker bears in time, less than two do."""
        begun = time.monotonic()
        for _ in range(5):
            self.factory.run(models.MAX_BATCH)
        per_request = (time.monotonic() - begun) / (5 * models.MAX_BATCH)
        return 0.65 / per_request

    async def newcomer(
        self, stack: Stack, http: HttpTraffic, watcher: Watcher, spiked: str
    ) -> None:
        await stack.remove_worker("worker-1")
        full = await watcher.until(lambda s: list(s.used_bytes) == [self.worker], 30)
        name = self.random.choice([n for n in self.names if n not in self.drawn])
        console.print(
            "[bold]5. Newcomer[/] — the second worker has left, the first is full; "
            f"{name}, which was never asked before, is asked"
        )
        before = set((full or watcher.sights[-1]).bound())
        # Who was asked just now makes room for nobody.
        await asyncio.sleep(LAST_USED_S)
        answer = await http.ask(name, 0)
        sight = await watcher.until(lambda s: name in s.resident(self.worker), 10)
        after = set((sight or watcher.sights[-1]).bound())
        gone = sorted(before - after)
        self.result.evicted_for_newcomer = gone[0] if gone else None
        self._no_errors([answer])
        self.checks.hold(
            len(gone) == 1 and gone[0] != spiked and name in after,
            f"{', '.join(gone) or 'nobody'} made room for {name} (nobody asks for it, and it is "
            f"asked least as a rule), which answered after {answer.seconds * 1000:.0f} ms",
        )

    def show(self, watcher: Watcher, spike: picture.Spike) -> None:
        marks = {spike.model: "spiked", self.result.evicted_for_newcomer or "": "made room"}
        console.print(report.table(watcher.sights, self.book, marks))
        picture.draw(
            self.png,
            watcher.sights,
            self.book.all(),
            spike,
            filled=self.filled,
            first_worker=self.worker,
            budget_bytes=self.budget,
            weights_bytes=self.weights_bytes,
        )
        console.print(f"  picture: {self.png.name}")

    def _no_errors(self, answers: list[Answer]) -> None:
        wrong = sum(a.wrong for a in answers)
        errors = [a for a in answers if a.error]
        self.result.wrong = sum(a.wrong for a in self.book.all())
        self.checks.hold(
            not wrong and not errors,
            f"{len(answers)} answers, {wrong} differ from the same model run directly in torch, "
            f"{len(errors)} errors" + (f" (first: {errors[0].error})" if errors else ""),
        )


def check_room(folder: Path) -> str | None:
    """None when there is memory and disk for the run, else one line that says what is missing."""
    memory, disk = psutil.virtual_memory().available, shutil.disk_usage(folder).free
    if memory < MEMORY_BYTES:
        return (
            f"the demo needs {show_bytes(MEMORY_BYTES)} of memory; "
            f"{show_bytes(memory)} are available"
        )
    if disk < DISK_BYTES:
        return (
            f"the demo needs {show_bytes(DISK_BYTES)} of disk under "
            f"{folder}; {show_bytes(disk)} are free (DEMO_ARGS='--folder …' names another place)"
        )
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--embedded", action="store_true", help="without RabbitMQ and Redis")
    parser.add_argument("--seed", type=int, default=None, help="repeat a draw")
    parser.add_argument("--folder", type=Path, default=Path(".roost"), help="where to work")
    parser.add_argument("--registered", type=int, default=100)
    parser.add_argument("--drawn", type=int, default=60)
    parser.add_argument("--png", type=Path, default=Path("demo.png"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    lack = check_room(arguments.folder)
    if lack:
        print(f"roost: {lack}", file=sys.stderr)
        return 1
    logs.configure("demo", "console", "error")
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**6)
    begun = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="demo-", dir=arguments.folder)).resolve()
    demo = Demo(folder, arguments.png.resolve(), arguments, seed)
    try:
        asyncio.run(demo.run())
    except Exception as error:  # noqa: BLE001 - whatever it is, the last line is still JSON
        if not isinstance(error, StackFailed | RoostError):
            console.print_exception()
        demo.checks.hold(condition=False, claim=f"the demo ran to its end: {error!r}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for claim in demo.checks.failed:
        print(f"roost: did not hold: {claim}", file=sys.stderr)
    console.print(f"  {time.monotonic() - begun:.0f} s; --seed {seed} draws the same models again")
    print(json.dumps(msgspec.to_builtins(demo.result)))
    return 1 if demo.checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
