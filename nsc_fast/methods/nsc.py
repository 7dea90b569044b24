"""Null-space compression merging (Lee, Jeong, Yoon; CVPR 2026): coefficients that minimise the mean
null-space ratio of the merged model's activations on unlabeled data.

Before and after, the ratios are measured beside what chance and the adapters alone give
(``nsc_fast.signal``); with default parameters the coefficients are the paper's all the same.
"""

from dataclasses import replace

from ..driver import check_data, optimise, target_modules
from ..packing import check_positions
from ..parameters import NSCParameters
from ..result import MergeResult
from .base import MergeInputs, Method, linear_result, merged_updates, per_task, require_model_and_data
from .measured import signal_probe


def run(inputs: MergeInputs, parameters: NSCParameters) -> MergeResult:
    require_model_and_data("nsc", inputs)
    check_data(inputs.updates, inputs.data)
    init = {task: float(inputs.weights.get(task, parameters.init)) for task in inputs.tasks}
    check_positions(inputs.model, inputs.data)
    probe, signal, notices = None, None, []
    if parameters.signal_rows:
        targets = target_modules(inputs.model, inputs.updates, parameters)
        inputs, probe = signal_probe(inputs, targets, parameters.signal_rows, parameters.micro_batch)
        signal = probe.before(merged_updates(inputs, per_task(inputs, parameters.init)))
    coefficients, history, interrupted = optimise(
        inputs.model,
        inputs.updates,
        inputs.data,
        parameters,
        init=init,
        seed=inputs.seed,
        impl=inputs.impl,
        on_step=inputs.on_step,
        checkpoints=inputs.checkpoints,
        processes=inputs.processes,
        levels=signal.alone if parameters.stop_at_alone else None,
        on_notice=notices.append,
    )
    more = {"history": tuple(history), "interrupted": interrupted, "notices": tuple(notices)}
    result = linear_result("nsc", inputs, parameters, coefficients, **more)
    if probe is None:
        return result
    signal = probe.after(signal, result.updates)
    return replace(result, signal=signal.to_dict(), notices=(*result.notices, *signal.notices()))


METHOD = Method(
    name="nsc",
    parameters=NSCParameters,
    run=run,
    needs_data=True,
    paper="Label-Free Cross-Task LoRA Merging with Null-Space Compression, CVPR 2026",
    output_rank="sum of ranks",
    cost="forward and backward passes over unlabeled data, up to the last target module",
    sharded_base=True,
)
