"""Every metric that a record may hold: its unit, which direction is better, what it means (docs/measuring.md 2)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """What a metric is.

    unit: of the stored value.  better: "lower", "higher" or "neither".  meaning: shown as help for a column.
    column: heading of the metric's column in the comparison table, shown where a run has the metric; None: it has no
        column, or the table treats it specially (report/columns.py).
    """

    unit: str
    better: str
    meaning: str
    column: str | None = None


def _bytes(meaning: str) -> Kind:
    return Kind("byte", "lower", meaning)


def _seconds(meaning: str) -> Kind:
    return Kind("second", "lower", meaning)


BREAKDOWN = (
    "parameters_bytes",
    "buffers_bytes",
    "gradients_bytes",
    "optimizer_bytes",
    "activations_bytes",
    "temporaries_bytes",
    "inputs_bytes",
    "workspace_bytes",
    "other_bytes",
)

# Above this `cpu_wait_share` a measured time tells how busy the machine was with other work, not what the step takes.
SHARED_CORES = 0.1

METRICS: dict[str, Kind] = {
    # peaks in torch's allocator; `phases` of the metric holds load, forward, backward, optimizer, step
    "peak_allocated_bytes": _bytes("largest sum of live blocks during a step, in blocks of 512 bytes"),
    "peak_active_bytes": _bytes("as allocated, with blocks that wait for another stream"),
    "peak_reserved_bytes": _bytes("largest sum of segments the allocator held from the device"),
    "peak_requested_bytes": _bytes("largest sum of what was asked for, before rounding"),
    "peak_memory_by_rank": Kind(
        "byte",
        "neither",
        "peak_allocated_bytes of each rank of a distributed cell, rank 0 first; the cell's is the largest",
    ),
    # step structure
    "baseline_allocated_bytes": _bytes("allocated right before the step: parameters, optimizer state, inputs"),
    "activation_peak_bytes": _bytes("peak of forward and backward above the level before the step"),
    "activation_gradients_bytes": _bytes(
        "gradients of trained parameters within activation_peak_bytes, at its peak; the rest grows with tokens"
    ),
    "saved_bytes": _bytes("held at the end of forward above the level before the step, minus outputs"),
    "optimizer_peak_bytes": _bytes("peak during the optimizer step"),
    "first_step_peak_allocated_bytes": _bytes("peak of the first step, before optimizer state exists"),
    "drift_bytes_per_step": _bytes("growth of the level before a step, from one measured step to the next; 0: no leak"),
    "peak_phase": Kind("phase", "neither", "the phase in which the step's peak falls"),
    # what is alive at the step's peak, by category; sums to peak_allocated_bytes
    "parameters_bytes": _bytes("model parameters at the peak"),
    "buffers_bytes": _bytes("model buffers at the peak"),
    "gradients_bytes": _bytes("gradients of trained parameters at the peak"),
    "optimizer_bytes": _bytes("optimizer state at the peak"),
    "activations_bytes": _bytes("tensors made in forward and alive at the peak"),
    "temporaries_bytes": _bytes("tensors made in backward or in the optimizer step and alive at the peak"),
    "inputs_bytes": _bytes("the batch at the peak"),
    "workspace_bytes": _bytes("library workspaces inside torch's allocator at the peak"),
    "other_bytes": _bytes("what none of the categories holds at the peak"),
    "peak_buffers": Kind(
        "buffers",
        "neither",
        "what is alive at the peak of forward and backward: bytes, count, operator, shape, place, module of the model",
    ),
    "timeline": Kind(
        "levels",
        "neither",
        "live bytes by category through the step with the peak: the highest level, and its phase, of each of 40 parts",
    ),
    # outside torch
    "process_device_bytes": _bytes("device memory of the process, as the driver reports it"),
    "device_used_bytes": _bytes("device memory in use by all processes, as the driver reports it"),
    "context_bytes": _bytes("process minus reserved after warm-up: CUDA context and kernels"),
    "host_rss_peak_bytes": _bytes("largest resident set of the worker process on the host"),
    "host_pinned_peak_bytes": _bytes("largest sum of host memory that levers hold for the device"),
    "optimizer_host_bytes": _bytes("optimizer state in host memory under `+optimizer_offload`, not on the device"),
    "optimizer_paged_bytes": _bytes(
        "states of a paged optimizer in CUDA's unified memory: in no peak of torch's allocator; on the device while it "
        "has room, else on the host"
    ),
    # allocator health
    "fragmentation_ratio": Kind("ratio", "lower", "1 - allocated / reserved at the peak"),
    "alloc_retries": Kind("count", "lower", "times the allocator freed its cache and tried again; above 0: the edge"),
    "ooms": Kind("count", "lower", "allocations that failed"),
    "device_allocs": Kind("count", "lower", "segments asked from the device"),
    # speed
    "step_time_s": _seconds("forward, backward, optimizer step; median of the measured steps, min and max: quartiles"),
    "forward_s": _seconds("forward and loss; median"),
    "backward_s": _seconds("backward; median"),
    "optimizer_s": _seconds("optimizer step and zero_grad; median"),
    "tokens_per_s": Kind(
        "token/second", "higher", "tokens that are not padding, of all ranks, divided by the median step time"
    ),
    "samples_per_s": Kind("sample/second", "higher", "samples of all ranks divided by the median step time"),
    # fidelity
    "reconstruction_rel": Kind(
        "ratio", "lower", "norm of (recomputed - true) / norm of true, per layer [first stream, second stream]"
    ),
    "reconstruction_rel_max": Kind("ratio", "lower", "worst reconstruction_rel over layers and streams"),
    "reconstruction_abs_max": Kind("absolute", "lower", "largest |recomputed - true| over layers, streams, elements"),
    "mismatched_elements": Kind("count", "lower", "elements of streams that backward did not restore bit for bit"),
    "gradient_rel_max": Kind(
        "ratio", "lower", "worst relative L2 error of a trained tensor's gradient against reference autograd"
    ),
    "gradient_cosine_min": Kind("cosine", "higher", "worst cosine of a trained tensor's gradient with autograd's"),
    "loss_abs_diff": Kind("absolute", "lower", "|loss - loss under reference autograd|"),
    "zero_grad_tensors": Kind("count", "lower", "trained tensors whose true gradient is zero, such as biases of keys"),
    "overflow_events": Kind("count", "lower", "NaN or infinite values met in streams or gradients"),
    "range_widenings": Kind(
        "count", "lower", "forward passes that left the range of fixed-point streams and ran again"
    ),
    "collapse": Kind(
        "text", "neither", "what broke down: the loss, or backward where recomputed activations are not exact"
    ),
    "starting_point_shift": Kind(
        "ratio", "lower", "norm of (last hidden state - pre-trained one) / norm of it, untrained, adapters at zero"
    ),
    "pretrained_loss": Kind("loss", "lower", "loss of the pre-trained model on the cell's batch, evaluation mode"),
    "starting_loss": Kind(
        "loss", "lower", "the same loss with the method applied, adapters as they are initialised, before any training"
    ),
    # size
    "parameters_total": Kind("count", "neither", "parameters of the model with the method applied"),
    "parameters_trainable": Kind("count", "lower", "parameters that are trained"),
    "adapter_file_bytes": _bytes("bytes of the trained tensors: what a saved adapter holds"),
    # compatibility
    "paper_meft_activation_bytes": _bytes("the paper's own definition: max_allocated - allocated after training"),
    "paper_lst_memory": _bytes("LST's definition: max_allocated over the run"),
    # memory optimisations (levers), as observed
    "compiled_graphs": Kind("count", "neither", "graphs that torch.compile has made, of all passes of the cell"),
    "graph_breaks": Kind("count", "lower", "places where torch.compile had to leave a graph and go on in Python"),
    "forward_calls_ratio": Kind("ratio", "neither", "layer forwards a step divided by those of a forward pass alone"),
    "loss_chunk_rows": Kind("count", "neither", "tokens of a chunk of the loss, in the last forward pass"),
    "offloaded_bytes": Kind("byte", "neither", "bytes moved to the host in one step"),
    "returned_bytes": Kind("byte", "neither", "bytes of those moved back to the device, each time counted"),
    "weights_moved_bytes": Kind("byte", "neither", "bytes of frozen weights moved to the device in one step"),
    # conditions
    "device_shared": Kind("flag", "lower", "1: another process used the device"),
    "cpu_wait_share": Kind(
        "ratio", "lower", "of the time that threads could have run while timing, the share they waited for a core"
    ),
    "throttle_reasons": Kind("names", "neither", "why the clocks were held down while timing"),
    "clocks_mhz": Kind("megahertz", "neither", "SM clock after the timed steps"),
    "temperature_c": Kind("celsius", "neither", "device temperature after the timed steps"),
    "power_w": Kind("watt", "neither", "power draw after the timed steps"),
    # fine-tuning: the task's score, beside the memory
    "score": Kind("score", "higher", "the task's first score on validation, of the checkpoint that is best there"),
    "score_untrained": Kind("score", "higher", "the same before the first step, of a language model; lora: zero-shot"),
    "score_test": Kind("score", "higher", "the same score on test rows, of the checkpoint chosen on validation"),
    "score_constant": Kind("score", "higher", "the score of the best answer that is always the same, on validation"),
    "score_mismatched": Kind("score", "higher", "MNLI: the score on genres that training has not, same checkpoint"),
    "accuracy": Kind("score", "higher", "share of validation rows answered right"),
    "f1": Kind("score", "higher", "harmonic mean of precision and recall on validation"),
    "matthews": Kind("score", "higher", "Matthews correlation on validation"),
    "pearson": Kind("score", "higher", "Pearson correlation on validation"),
    "spearman": Kind("score", "higher", "Spearman correlation on validation"),
    "validation_loss": Kind("loss", "lower", "mean loss on validation, of the best checkpoint"),
    "training_loss": Kind("loss", "lower", "loss of the last step; `samples` of every step, before its update"),
    "learning_curve": Kind("rows", "neither", "[step, validation loss, validation score] of each evaluation"),
    "best_step": Kind("step", "neither", "optimizer steps after which the best checkpoint was written"),
    "training_steps": Kind("count", "neither", "optimizer steps of the training"),
    "training_tokens": Kind("token", "neither", "tokens trained on that are not padding; of images: samples"),
    "training_time_s": _seconds("all training steps; without evaluation, checkpoints and start-up"),
    "training_tokens_per_s": Kind("token/second", "higher", "training_tokens divided by training_time_s"),
    # the harness
    "build_s": _seconds("building model, method, optimizer and batch"),
    "passes_s": _seconds("the measuring passes, warm-up included"),
}

# Metrics whose value is not a single number, so that neither bounds nor comparisons apply to it.
NOT_A_NUMBER = frozenset(
    {
        *("learning_curve", "peak_buffers", "peak_memory_by_rank", "peak_phase", "reconstruction_rel"),
        *("throttle_reasons", "timeline"),
    }
)
