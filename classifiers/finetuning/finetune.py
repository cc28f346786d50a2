"""Fine-tuning: backbone and head are trained end to end in torch, for comparison with frozen features.

The last layer is not replaced. The head reads the tensor at which `extractor.backbones.export` cuts, the input of the last
classification layer, so a fine-tuned network is exported, cached and fused like any other backbone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers.bundles.bundle import Bundle
from classifiers.bundles.bundle_folder import reserved
from classifiers.bundles.held_out import predict_held_out
from classifiers.bundles.predictor import Predictor, Recipe
from classifiers.evaluation.registry import task_of
from classifiers.evaluation.task import need_single_label
from classifiers.heads.fitted import DenseHead
from classifiers.reports.illustrations import illustrate
from classifiers.training.cost import fitted_share, needed
from classifiers.training.leaks import LeakReport, guard, look
from classifiers.training.roles import Roles, assign_roles, inner_validation
from classifiers.training.train import INNER, Judged, add_leaks, require_roles, save, weight_notes
from extractor.backbones import networks
from extractor.backbones.export import to_onnx
from extractor.backbones.networks import Loaded
from extractor.backbones.registry import Backbone
from extractor.data.files import Files, Located
from extractor.data.sources import Source, files_of, open_source
from extractor.machine import Clock, Meter, new_clock, timed
from extractor.pipeline.plan import list_samples
from extractor.pipeline.prepare import fingerprints
from extractor.pipeline.run import survey
from extractor.pixels.settings import AugmentSettings
from extractor.runtime.session import resolve_device
from extractor.signals import StopFlag, stop_on_signal
from store.cache import FeatureCache, is_cache
from store.errors import BadDataError, DeviceUnavailableError, InterruptedRunError, UsageError
from store.format.samples import Row, SampleTable
from store.progress.stages import Stage

from .checkpoints import NETWORK, Checkpoints
from .init_head import AffineHead, start_from
from .loader import Item
from .module import DivergedError, end_to_end
from .ranks import run_on_all
from .settings import HEAD_FACTOR, FineTuneOptions, FineTuneSettings
from .trainer import Choice, Plan, devices_of, isolated, run_epochs

log = logging.getLogger("penult.classifiers")


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned network and its head: refitted on all images until the best epoch, or as of that epoch.

    Attributes:
        loaded: on the CPU, in eval mode, with torchvision's architecture (its own classifier is still there, not trained).
        weight, bias: the head on penultimate features, ``(k, d)`` and ``(k,)`` float32; logits = features @ weight.T + bias.
        temperature: of these logits, fitted on the validation images with the network that was not fitted on them; None if
            the head that it started from was.
        history: a row for each epoch; epoch 0 is validation before any training: epoch, train_loss (of augmented images,
            with label smoothing), val_loss, val_accuracy, lr (of the transferred layers, at its beginning), head_lr, seconds;
            with a refit, refit_loss is its train_loss.
        best_epoch: the one with the lowest validation loss, epoch 0 excluded.
        seconds: wall time with loading and decoding; of interrupted runs, up to their last finished epoch.
        images: images passed through the network, training and validation, and the refit.
        trained_parameters: number of trained parameters, those of the head included.
        head_lr_factor: the factor that was used.
    """

    loaded: Loaded
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    temperature: float | None
    history: list[dict[str, Any]]
    best_epoch: int
    seconds: float
    images: int
    trained_parameters: int
    head_lr_factor: float


def train_network(
    train: Sequence[Item],
    validation: Sequence[Item],
    n_classes: int,
    backbone: Backbone,
    options: FineTuneOptions,
    *,
    start: AffineHead | None = None,
    checkpoints: Checkpoints | None = None,
    log_dir: Path | None = None,
) -> FineTuned:
    """Train backbone and head end to end on images, with early stopping on the validation loss; then refit on all of them.

    Args:
        train, validation: paths and labels, 0 to n_classes - 1.
        start: the head to start from; None for zeros.
        checkpoints: where finished epochs are kept; a run that finds its own there continues after them.
        log_dir: a folder for the history, written after every epoch, see `history`.

    Raises:
        UsageError: options that do not fit the network; an unknown ``freeze_until`` is answered with the nearest names.
        BadDataError: labels that do not fit, an image that cannot be decoded, a loss that is not finite.
        FingerprintMismatchError: ``start`` takes other features.
        InputMissingError: an image or the weights cannot be read.
        DeviceUnavailableError: torch cannot use the device.
        OutputExistsError: the checkpoints are of a run with other settings.
        LockedError: another run writes these checkpoints.
        InterruptedRunError: SIGINT or SIGTERM; with checkpoints the finished epochs are kept.
    """
    if options.head_lr_factor is None:
        options = options.replace(head_lr_factor=1.0 if start else HEAD_FACTOR)
    _check_items(train, validation, n_classes)
    if backbone.is_file:
        message = f"{backbone.name} is an ONNX file and cannot be trained: name a torchvision network and --weights FILE.pth"
        raise UsageError(message)
    devices = devices_of(options)
    _check_share(train, validation, options, devices)
    begin = time.perf_counter()
    what = "finished epochs are kept" if checkpoints else "nothing of an unfinished fine-tuning is kept"
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signal(what))
        kept = checkpoints or stack.enter_context(Checkpoints.passing())
        stack.enter_context(kept.held())
        try:
            plan = Plan(train, validation, n_classes, backbone, options, devices, start, kept, log_dir)
            tuned = _tune(plan, stop)
        except BaseException as error:
            # Lightning turns a signal into exceptions of its own, one of them a SystemExit.
            if stop:
                raise InterruptedRunError(stop.signum, _then(checkpoints)) from None
            if isinstance(error, DivergedError):
                kept.remove()  # a resumed run would diverge again
            if "out of memory" in str(error) and devices[0] != "cpu":
                message = (
                    f"--device {options.device}: out of memory with {options.batch_size} images at a time; use a smaller "
                    f"batch_size"
                )
                raise DeviceUnavailableError(message) from error
            raise
        if stop:
            raise InterruptedRunError(stop.signum, _then(checkpoints))
    return replace(tuned, seconds=round(tuned.seconds + time.perf_counter() - begin, 3))


def _then(checkpoints: Checkpoints | None) -> str:
    return "to continue" if checkpoints and checkpoints.file.exists() else "to start over"


def _check_items(train: Sequence[Item], validation: Sequence[Item], n_classes: int) -> None:
    empty = sorted(set(range(n_classes)) - {label for _, label in train})
    wrong = [f"{path} has label {label}" for path, label in (*train, *validation) if not 0 <= label < n_classes]
    message = None
    if n_classes < 2:
        message = f"{n_classes} classes: a classifier needs at least 2"
    elif wrong:
        message = f"{wrong[0]}; expected 0 to {n_classes - 1}"
    elif empty:
        message = f"no training image of class {', '.join(map(str, empty))}"
    elif not validation:
        message = "no validation images: the best epoch is chosen by them"
    if message:
        raise BadDataError(message)


def _check_share(train: Sequence[Item], validation: Sequence[Item], options: FineTuneOptions, devices: Sequence[str]) -> None:
    """Each device takes its share of every batch, and batch normalisation has no statistics of one image."""
    least = min(len(train), len(validation), options.batch_size) // len(devices)
    if len(devices) > 1 and least < 2:
        message = f"--device {options.device}: {least} image(s) of a batch for each device; expected at least 2"
        raise UsageError(message)


def _tune(plan: Plan, stop: StopFlag) -> FineTuned:
    """Train by a plan, then refit from the same start; ``seconds`` is that of earlier runs only."""
    options, checkpoints = plan.options, plan.checkpoints
    loaded = networks.load(plan.backbone)
    facts = {
        **{name: value for name, value in options.model_dump().items() if name not in ("workers", "quiet")},
        "device": [device.partition(":")[0] for device in plan.devices],
        "network": plan.backbone.name,
        "weights": loaded.weights_digest,
        "pixels": loaded.preprocess.facts(),
        "init_head": plan.start.sha256 if plan.start else None,
        "images": checkpoints.images or [len(plan.train), len(plan.validation)],
        "versions": {name: version(name) for name in ("torch", "lightning")},
    }
    state = checkpoints.resume(facts)
    earlier = float(state["run"]["seconds"]) if state else 0.0
    if state and state["training"]["choice"]:  # a refit had begun
        model, ended = None, state
    else:
        model, ended = _fit(plan, loaded, facts, stop)
    choice, rows, images = Choice.of(ended), {}, 0
    if options.refit:
        log.info("refit on all %d images, for %d epochs", len(plan.train) + len(plan.validation), choice.best_epoch)
        loaded = networks.load(plan.backbone) if model else loaded
        model, ended = _fit(plan.refit(choice), loaded, facts, stop)
        rows, images = {row["epoch"]: row for row in ended["training"]["history"]}, ended["training"]["images"]
    assert model is not None
    model.hook.remove()
    model.cpu().load_state_dict(ended["training"]["best_state"])
    network = loaded.network.eval().requires_grad_()
    network.zero_grad()
    digest = networks.digest(network.state_dict())
    refitted = [{"refit_loss": rows[row["epoch"]]["train_loss"] if row["epoch"] in rows else None} for row in choice.history]
    return FineTuned(
        loaded=Loaded(network, loaded.preprocess, f"fine-tuned from {loaded.weights_name}", digest, loaded.source),
        weight=model.head.weight.detach().numpy(),
        bias=model.head.bias.detach().numpy(),
        temperature=choice.temperature,
        history=[{**row, **(more if rows else {})} for row, more in zip(choice.history, refitted, strict=True)],
        best_epoch=choice.best_epoch,
        seconds=earlier,
        images=choice.images + images,
        trained_parameters=sum(parameter.numel() for group in model.groups for parameter in group["params"]),
        head_lr_factor=options.head_lr_factor or HEAD_FACTOR,
    )


def _fit(plan: Plan, loaded: Loaded, facts: dict[str, Any], stop: StopFlag) -> tuple[Any, dict[str, Any]]:
    """Train by a plan, from its last checkpoint if it has one: the module of `end_to_end`, and the last checkpoint."""
    with isolated(plan.devices, plan.options.seed):
        model = end_to_end(loaded, plan)
        state = plan.state()
        if not (state and state["run"]["finished"]):
            if len(plan.devices) > 1:
                run_on_all(plan, facts, stop)
            else:
                with plan.stage() as stage:

                    def advance(images: int) -> None:  # Lightning copies the module: a method would bring the stage along
                        stage.step(images)

                    run_epochs(plan, loaded, model, facts, stop, advance)
            state = plan.state()
    assert state is not None  # every epoch writes one
    return model, state


def finetune(
    data: str | Path | FeatureCache | Source,
    bundle: str | Path,
    settings: FineTuneSettings,
    *,
    overwrite: bool = False,
) -> Bundle:
    """Train backbone and head end to end on the same split, and save them as a bundle like any other.

    Finished epochs are kept beside the bundle until it is complete; the same call continues after them.

    Args:
        data: a cache, opened or not, whose sample table, root and failures are used (so that comparisons are paired), or a
            dataset as `open_source` takes or returns it.
        bundle: the folder of the bundle.
        settings: the network, how to train, and the split if ``data`` is a dataset without one; for ``init_head`` and
            ``log_dir`` see the modules `init_head` and `history`.
        overwrite: replace an existing bundle, or an unfinished one with other settings.

    Raises:
        BadDataError: the data cannot be trained on, or the training diverged.
        OutputExistsError: the bundle exists, or an unfinished one with other settings.
        LockedError: another run makes a bundle there.

    >>> import classifiers
    >>> network = {"backbone": "squeezenet1_1", "weights": "random", "resize": 40, "crop": 32}
    >>> settings = classifiers.FineTuneSettings(**network, epochs=1, device="cpu", quiet=True, thumbnails=False)
    >>> classifiers.finetune("pets.cache", "tuned.head", settings).kind
    'fine-tuned'
    """
    out = Path(bundle)
    with reserved(out, overwrite=overwrite):
        if isinstance(data, str | Path):
            if is_cache(data):
                data = FeatureCache(data)
            else:
                data = open_source(
                    data, root=settings.root, follow_symlinks=settings.follow_symlinks, group_by=settings.group_by
                )
        with Stage("fine-tuning", bar=False, quiet=settings.quiet):
            return _finetune(data, out, settings, overwrite=overwrite)


def _finetune(data: FeatureCache | Source, out: Path, settings: FineTuneSettings, *, overwrite: bool) -> Bundle:
    options, clock = settings.part(FineTuneOptions), new_clock()
    devices_of(options)
    with timed(clock, "data"):
        images = _prepare_images(data, settings)
    init_head = Bundle.load(settings.init_head) if settings.init_head else None
    start = start_from(init_head, images.classes, [row.sha256 for row in images.roles.report]) if init_head else None
    pairs = [[(row.sha256.hex(), row.label) for row in rows] for rows in (images.roles.fit, images.roles.choose)]
    checkpoints = Checkpoints.beside(out, hashlib.sha256(json.dumps(pairs).encode()).hexdigest(), overwrite=overwrite)
    meter = Meter(*options.device.split(","))
    tuned = train_network(
        _labelled(images.roles.fit, images),
        _labelled(images.roles.choose, images),
        len(images.classes),
        settings.network(),
        options,
        start=start,
        checkpoints=checkpoints,
        log_dir=settings.log_dir,
    )
    spent = meter.read()
    clock["training"] = spent.seconds
    if init_head and init_head.fitted() & {row.sha256 for row in images.roles.choose}:
        tuned = replace(tuned, temperature=None)  # it would be that of logits which have seen the answers
    with timed(clock, "scores"):
        judged = _judge_finetuned(tuned, images, settings, checkpoints.folder / NETWORK, clock)
    cost = {**judged.bundle.cost, **spent.facts()}
    if init_head:
        cost["init_head"] = needed(init_head.cost, fitted_share(init_head))
    hyperparameters = {**judged.bundle.hyperparameters, "init_head": start and start.name}
    facts = replace(judged.bundle, cost=cost, hyperparameters=hyperparameters)
    saved = save(replace(judged, bundle=facts), out, overwrite=overwrite)
    checkpoints.remove()
    return saved


@dataclass(frozen=True)
class _Images:
    """Images by role, the files they are read from, their classes, and leaks if there are features to look for them."""

    table: SampleTable
    roles: Roles
    files: Files
    classes: list[str]
    leaks: LeakReport | None = None


def _prepare_images(data: FeatureCache | Source, settings: FineTuneSettings) -> _Images:
    if isinstance(data, FeatureCache):
        table: SampleTable = data.samples
        if settings.init_head:
            data.require_backbone()
    else:
        list_samples(data, settings.survey)
        table = survey(data, networks.load(settings.network()).preprocess, settings.survey)
    need_single_label(table.task.name, "fine-tuning")
    roles = assign_roles(table)
    files = files_of(table, settings.root) if isinstance(data, FeatureCache) else data.files
    require_roles(table, roles)
    leaks = None
    if isinstance(data, FeatureCache):
        roles, leaks = look(data, roles)
        guard(leaks, "warn")
    else:
        log.info("near copies are not looked for: that needs the features of a cache")
    classes = sorted({str(row.label) for row in roles.fit})
    if not roles.choose:
        fitted, choose = inner_validation(roles.fit, seed=settings.seed)
        roles = replace(roles, fit=fitted, choose=choose, facts={**roles.facts, "chosen_on": INNER})
    return _Images(table, roles, files, classes, leaks)


def _judge_finetuned(tuned: FineTuned, images: _Images, settings: FineTuneSettings, network: Path, clock: Clock) -> Judged:
    """Export the network to ONNX, evaluate it on the held-out images, and collect what goes into the bundle."""
    zeros, ones = np.zeros(tuned.weight.shape[1], np.float32), np.ones(tuned.weight.shape[1], np.float32)
    head = DenseHead(zeros, ones, [(tuned.weight, tuned.bias)], images.classes, tuned.temperature or 1.0)
    backbone, roles, classes = settings.network(), images.roles, images.classes
    with Stage(f"exporting the fine-tuned {backbone.name}"), timed(clock, "export"):
        facts = to_onnx(tuned.loaded, backbone.name, network)
    storage = "float32"  # its features are never cached, so never rounded
    device = settings.device.partition(",")[0]
    task = task_of(images.table.task.name, classes, temperature=tuned.temperature)
    predictor = Predictor(Recipe(network, facts.preprocess, head.probabilities, task, storage), device=device)
    predictions = metrics = shown = None
    if roles.report:
        truth, name = images.table.truth(roles.report), str(roles.facts["reported_on"])
        predictions = predict_held_out(predictor, roles.report, truth, images.files, name)
        evaluation = task.score(truth, predictions.probabilities, name, predictions.units)
        metrics = replace(evaluation, notes=[*evaluation.notes, *weight_notes(settings.class_weight)]).to_json()
        if images.leaks is not None:
            add_leaks(metrics, images.leaks, predictions, task)
        with timed(clock, "report"):
            shown = illustrate(predictions, classes, files=images.files if settings.thumbnails else None)
    options = settings.part(FineTuneOptions)
    bundle = Bundle(
        path=Path(),
        kind="fine-tuned",
        head="fine-tuned",
        classes=classes,
        backbone=facts,
        fingerprint=fingerprints(facts, resolve_device(device).partition(":")[0], storage)[0],
        split=roles.facts,
        hyperparameters={
            **{name: value for name, value in options.model_dump().items() if name not in AugmentSettings.model_fields},
            "head_lr_factor": tuned.head_lr_factor,
            "augment": options.augmentation.facts() if options.augmentation else None,
            "best_epoch": tuned.best_epoch,
            "temperature": tuned.temperature,
            "trained_parameters": tuned.trained_parameters,
            "weights": backbone.weights and Path(backbone.weights).name,
        },
        history=tuned.history,
        metrics=metrics,
        cost={"train_seconds": round(tuned.seconds, 3), "extract_seconds": 0.0, "images": tuned.images},
    )
    digests = [row.sha256 for row in [*roles.fit, *roles.choose]]
    return Judged(bundle, network, head.to_onnx(), digests, predictions, shown, clock=clock)


def _labelled(rows: Sequence[Row], images: _Images) -> list[Item]:
    index = {label: i for i, label in enumerate(images.classes)}
    return [(Located(images.files, row.path), index[str(row.label)]) for row in rows]
