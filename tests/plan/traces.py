"""Traces and machines for the planner's tests: random ones for properties, shaped ones for examples."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from mball.schema import Gather, Lane, Link, LiveRange, Machine, Step, Tensor, Tier, Trace, Treatment

PAGE_BYTES = 4096
LEAVES = (Treatment.OFFLOAD, Treatment.RECOMPUTE)


def make_machine(
    *,
    page_bytes: int = PAGE_BYTES,
    bandwidth: float = 1e9,
    latency_s: float = 1e-5,
    window_bytes: int = 0,
    write_bandwidth: float | None = None,
) -> Machine:
    """`write_bandwidth` is of a link of its own for what leaves the device; None: it shares the other one."""
    out = None
    if write_bandwidth is not None:
        out = Link(bandwidth_bytes_per_s=write_bandwidth, latency_s=latency_s, source=Tier.DEVICE, target=Tier.DISK)
    return Machine(
        name="test",
        page_bytes=page_bytes,
        alignment_bytes=512,
        link=Link(bandwidth_bytes_per_s=bandwidth, latency_s=latency_s, window_bytes=window_bytes),
        write_link=out,
    )


def make_weights(sizes: list[int], *, start_bytes: int = 1234, gap_bytes: int = 0) -> tuple[Tensor, ...]:
    """Weights one after another in one file, from an odd offset on."""
    offset = start_bytes
    weights = []
    for number, size in enumerate(sizes):
        weights.append(
            Tensor.weight(f"w{number}", dtype="uint8", shape=(size,), size_bytes=size, file="f", offset_bytes=offset)
        )
        offset += size + gap_bytes
    return tuple(weights)


def make_step(name: str, *reads: int, graph: str | None = "g", time_s: float | None = 1e-3, scratch: int = 0) -> Step:
    return Step(name=name, graph=graph, reads=reads, scratch_bytes=scratch, flops=0, time_s=time_s)


def make_chain(num_layers: int, size_bytes: int, *, time_s: float = 1e-3) -> Trace:
    """A step a layer, a weight a step."""
    return Trace(
        name="chain",
        tensors=make_weights([size_bytes] * num_layers),
        steps=tuple(make_step(f"layer{number}", number, time_s=time_s) for number in range(num_layers)),
    )


def make_tied(num_layers: int, size_bytes: int, embedding_bytes: int) -> Trace:
    """A chain whose first and last step read one weight."""
    sizes = [embedding_bytes] + [size_bytes] * num_layers
    steps = [make_step("embed", 0)]
    steps += [make_step(f"layer{number}", number) for number in range(1, num_layers + 1)]
    return Trace(name="tied", tensors=make_weights(sizes), steps=(*steps, make_step("head", 0)))


def make_training(
    num_layers: int,
    weight_bytes: int,
    activation_bytes: int,
    *,
    time_s: float = 1e-3,
    may: tuple[Treatment, ...] = (Treatment.STAY, Treatment.OFFLOAD),
    recompute_s: float | None = None,
) -> Trace:
    """A step a layer forward and another, twice as long, backward; what a layer bears is read when it is next."""
    born = [
        replace(
            Tensor.activation(
                f"a{layer}", size_bytes=activation_bytes, live=LiveRange(first=layer, end=2 * num_layers - layer)
            ),
            may=may,
            recompute_s=recompute_s,
        )
        for layer in range(num_layers)
    ]
    steps = [make_step(f"forward{layer}", layer, time_s=time_s) for layer in range(num_layers)]
    steps += [
        make_step(f"backward{layer}", layer, num_layers + layer, time_s=2 * time_s)
        for layer in reversed(range(num_layers))
    ]
    tensors = (*make_weights([weight_bytes] * num_layers), *born)
    return Trace(name="training", tensors=tensors, steps=tuple(steps))


def make_optimized(
    num_layers: int,
    weight_bytes: int,
    *,
    time_s: float = 1e-3,
    host_s: float | None = None,
    on_device: bool = False,
    activation_bytes: int = 0,
    state_bytes: int | None = None,
) -> Trace:
    """Training with an optimizer: weights, gradients of their size, and a state of twice that, homes in host memory.

    A step a layer forward and another, twice as long, backward, which bears the gradient; after it a step changes
    weight and state: on the host lane, or on the device itself.

    Args:
        host_s: of each step of the optimizer.
        on_device: whether it runs there.
        activation_bytes: what forward bears for backward; 0: nothing.
        state_bytes: of each weight.
    """
    num_state = 2 * weight_bytes if state_bytes is None else state_bytes
    homed = [
        replace(tensor, home=tensor.home and replace(tensor.home, tier=Tier.HOST))
        for tensor in make_weights([weight_bytes] * num_layers + [num_state] * num_layers, start_bytes=0)
    ]
    may = (Treatment.STAY, Treatment.OFFLOAD)
    steps = [make_step(f"forward{layer}", layer, time_s=time_s) for layer in range(num_layers)]
    born: list[Tensor] = []
    for layer in reversed(range(num_layers)):
        backward, update = len(steps), len(steps) + 1
        gradient = 2 * num_layers + len(born)
        live = LiveRange(first=backward, end=update + 1)
        born.append(replace(Tensor.activation(f"g{layer}", size_bytes=weight_bytes, live=live), may=may))
        reads = [layer]
        if activation_bytes:
            live = LiveRange(first=layer, end=backward + 1)
            reads.append(2 * num_layers + len(born))
            born.append(replace(Tensor.activation(f"a{layer}", size_bytes=activation_bytes, live=live), may=may))
        steps.append(make_step(f"backward{layer}", *reads, time_s=2 * time_s))
        optimizer = make_step(f"update{layer}", gradient, num_layers + layer, time_s=host_s)
        steps.append(
            replace(
                optimizer,
                reads=(*optimizer.reads, layer),
                writes=(layer, num_layers + layer),
                graph="optimizer",
                lane=Lane.COMPUTE if on_device else Lane.HOST,
            )
        )
    return Trace(name="optimized", tensors=(*homed, *born), steps=tuple(steps))


def make_changing(num_layers: int, size_bytes: int, *, num_weights: int = 1, time_s: float = 1e-5) -> Trace:
    """A chain whose steps read `num_weights` weights each, homes in host memory, and change them."""
    weights = make_weights([size_bytes] * num_weights * num_layers, start_bytes=0)
    own = [range(layer * num_weights, (layer + 1) * num_weights) for layer in range(num_layers)]
    steps = [make_step(f"layer{layer}", *reads, time_s=time_s) for layer, reads in enumerate(own)]
    return Trace(
        name="changing",
        tensors=tuple(replace(each, home=each.home and replace(each.home, tier=Tier.HOST)) for each in weights),
        steps=tuple(replace(step, writes=step.reads) for step in steps),
    )


def make_host_machine(
    *,
    page_bytes: int = PAGE_BYTES,
    bandwidth: float = 1e9,
    latency_s: float = 0.0,
    write_bandwidth: float | None = None,
    host_bandwidth: float | None = None,
) -> Machine:
    """Homes are in host memory. `write_bandwidth` as for `make_machine`."""
    machine = make_machine(page_bytes=page_bytes, bandwidth=bandwidth, latency_s=latency_s)
    out = None
    if write_bandwidth is not None:
        out = Link(bandwidth_bytes_per_s=write_bandwidth, latency_s=latency_s, source=Tier.DEVICE, target=Tier.HOST)
    return replace(
        machine,
        link=replace(machine.link, source=Tier.HOST),
        write_link=out,
        host_bandwidth_bytes_per_s=host_bandwidth,
    )


def make_gathering(num_layers: int, size_bytes: int, table_bytes: int, rows_bytes: int, *, tied: bool = False) -> Trace:
    """A chain behind a step that gathers rows of a table; where tied, its last step reads the table."""
    chain = make_tied(num_layers, size_bytes, table_bytes)
    table, *others = chain.tensors
    embed, *layers, head = chain.steps
    embed = replace(embed, reads=(), gathers=(Gather(tensor=0, size_bytes=rows_bytes),))
    return replace(
        chain,
        name="gathering",
        tensors=(replace(table, may=(*table.may, Treatment.GATHER)), *others),
        steps=(embed, *layers, head) if tied else (embed, *layers),
    )


machines = st.builds(
    make_machine,
    page_bytes=st.sampled_from([512, 4096, 65536]),
    bandwidth=st.sampled_from([1e7, 1e9]),
    latency_s=st.sampled_from([0.0, 1e-4]),
    write_bandwidth=st.sampled_from([None, None, 1e8]),
)


@st.composite
def movable(draw: st.DrawFn, name: str, index: int, steps: list[Step]) -> tuple[Tensor, list[Step]]:
    """A tensor that is born in the pass and may leave the device, and the steps, some of which read it."""
    first = draw(st.integers(0, len(steps) - 1))
    live = LiveRange(first=first, end=draw(st.integers(first + 1, len(steps))))
    leaves = draw(st.sampled_from([(Treatment.OFFLOAD,), (Treatment.RECOMPUTE,), tuple(LEAVES)]))
    tensor = replace(
        Tensor.activation(name, size_bytes=draw(st.one_of(st.just(0), st.integers(1, 300_000))), live=live),
        may=(Treatment.STAY, *leaves),
        recompute_s=draw(st.sampled_from([0.0, 1e-5, 2e-3])) if Treatment.RECOMPUTE in leaves else None,
    )
    readers = draw(st.sets(st.integers(live.first, live.end - 1))) | {live.end - 1}
    return tensor, [
        replace(step, reads=(*step.reads, index)) if number in readers else step for number, step in enumerate(steps)
    ]


@st.composite
def traces(draw: st.DrawFn, *, max_steps: int = 14, writing: bool = True) -> Trace:
    """Any trace: tiny, large and empty weights, shared and unread ones, several files, graphs and eager steps.

    Most passes repeat; some run once. Unless `writing`, no step writes a weight.
    """
    cyclic = draw(st.sampled_from([True, True, True, False]))
    size = st.one_of(st.just(0), st.integers(1, 2_000), st.integers(60_000, 70_000), st.integers(100_000, 900_000))
    sizes = draw(st.lists(size, max_size=12))
    weights, offsets = [], {"a": 0, "b": 8}
    for number, size_bytes in enumerate(sizes):
        file = draw(st.sampled_from("ab"))
        offsets[file] += draw(st.sampled_from([0, 3, 512, 20_000, 100_000]))
        weights.append(
            Tensor.weight(
                f"w{number}",
                dtype="uint8",
                shape=(size_bytes,),
                size_bytes=size_bytes,
                file=file,
                offset_bytes=offsets[file],
            )
        )
        if draw(st.booleans()):
            weights[-1] = replace(weights[-1], may=(*weights[-1].may, Treatment.GATHER))
        offsets[file] += size_bytes
    indices = st.integers(0, len(sizes) - 1) if sizes else st.nothing()
    num_steps = draw(st.integers(0, max_steps))
    writing = draw(st.sampled_from([False, False, True])) and writing
    steps = [
        make_step(
            f"s{number}",
            *draw(st.lists(indices, unique=True, max_size=4) if sizes else st.just([])),
            graph=draw(st.sampled_from([None, "g", "g", "g", "h"])),
            time_s=draw(st.sampled_from([None, 0.0, 1e-4, 5e-3])),
            scratch=draw(st.sampled_from([0, 1000, 50_000])),
        )
        for number in range(num_steps)
    ]
    for number, step in enumerate(steps):
        if sizes and draw(st.sampled_from([False, False, True])):
            index = draw(indices)
            if index not in step.reads:
                gather = Gather(tensor=index, size_bytes=draw(st.integers(0, sizes[index])))
                steps[number] = step = replace(step, gathers=(gather,))
        if sizes and writing and draw(st.booleans()):
            steps[number] = replace(step, writes=(draw(indices),))
    activations = []
    if num_steps:
        for number in range(draw(st.integers(0, 2))):
            first = draw(st.integers(0, num_steps - 1))
            live = LiveRange(first=first, end=draw(st.integers(first + 1, num_steps)))
            activations.append(Tensor.activation(f"a{number}", size_bytes=draw(st.integers(0, 99_999)), live=live))
        for number in range(draw(st.sampled_from([0, 0, 1, 3]))):
            tensor, steps = draw(movable(f"m{number}", len(sizes) + len(activations), steps))
            activations.append(tensor)
    return Trace(name="any", tensors=(*weights, *activations), steps=tuple(steps), cyclic=cyclic)


host_machines = st.builds(
    make_host_machine,
    page_bytes=st.sampled_from([512, 4096, 65536]),
    bandwidth=st.sampled_from([1e7, 1e9]),
    latency_s=st.sampled_from([0.0, 1e-4]),
    write_bandwidth=st.sampled_from([None, None, 1e8]),
    host_bandwidth=st.sampled_from([None, 1e8, 2e10]),
)


@st.composite
def lane_traces(draw: st.DrawFn, *, max_steps: int = 12) -> Trace:
    """Any trace whose homes are in host memory; some steps run on the host lane, and some write what they read."""
    trace = draw(traces(max_steps=max_steps))
    lanes = [draw(st.sampled_from([Lane.COMPUTE, Lane.COMPUTE, Lane.HOST])) for _ in trace.steps]
    homed = [index for index, _ in trace.homed()]
    some = st.lists(st.sampled_from(homed), unique=True, max_size=3) if homed else st.just([])
    steps = [
        replace(step, lane=lane, writes=tuple(draw(some)) if draw(st.booleans()) else step.writes)
        for step, lane in zip(trace.steps, lanes, strict=True)
    ]
    tensors = []
    for index, tensor in enumerate(trace.tensors):
        live = tensor.live
        if tensor.home is not None:
            tensors.append(replace(tensor, home=replace(tensor.home, tier=Tier.HOST)))
            continue
        assert live is not None
        crosses = any(index in step.reads and step.lane is not lanes[live.first] for step in steps)
        may = tensor.may
        if crosses and Treatment.OFFLOAD not in may:
            may = (*may, Treatment.OFFLOAD)
        tensors.append(replace(tensor, may=may))
    return replace(trace, tensors=tuple(tensors), steps=tuple(steps))
