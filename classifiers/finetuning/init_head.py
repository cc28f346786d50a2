"""The init head of fine-tuning: a head trained on cached features to start from (linear probing, then all layers).

Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution": with a head that already
fits, the first steps do not distort the features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifiers.bundles.bundle import Bundle, task_of_bundle
from extractor.backbones.networks import Loaded
from extractor.graphs.backbone_facts import BackboneFacts
from extractor.graphs.onnx_file import external_files, read_model
from extractor.pixels.pixel_drift import libraries, then_and_now
from extractor.pixels.preprocess import probe
from store.errors import BadDataError, FingerprintMismatchError, UsageError
from store.fingerprint import short

# The operators that `DenseHead.to_onnx` writes for one layer: standardise, multiply and add, divide by the temperature.
AFFINE = ["Sub", "Div", "Gemm", "Div", "Softmax"]
AFFINE_HEADS = "logistic or ridge"


@dataclass(frozen=True)
class AffineHead:
    """A head as one matrix; logits = features @ weight.T + bias, with standardisation and temperature inside.

    Attributes:
        weight, bias: ``(k, d)`` and ``(k,)``, float32.
        classes: labels in the order of the outputs.
        name: the bundle it came from.
        sha256: of that bundle's ``head.onnx``.
        backbone: the backbone whose features it takes.
        probe: digest of the test image under the pixel path of those features, as in a fingerprint.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    classes: Sequence[str]
    name: str
    sha256: str
    backbone: BackboneFacts
    probe: str

    @classmethod
    def of(cls, bundle: Bundle) -> AffineHead:
        """Fold standardisation and temperature of a bundle's head into one matrix.

        Raises:
            UsageError: one matrix cannot represent the head, or it is for another task.
            BadDataError: it refers to data in other files.
        """
        from onnx import numpy_helper

        if not task_of_bundle(bundle).exclusive:
            message = f"--init-head {bundle.path} is a head for {bundle.task}; fine-tuning needs one label for each image"
            raise UsageError(message)
        model = read_model(bundle.path / "head.onnx")
        if external_files(model):
            message = f"{bundle.path}/head.onnx refers to data in other files, which is refused"
            raise BadDataError(message)
        graph = model.graph
        if [node.op_type for node in graph.node] != AFFINE:
            message = (
                f"--init-head {bundle.path} is a {bundle.head} head, which no single layer can represent; "
                f"train one with --head {AFFINE_HEADS}"
            )
            raise UsageError(message)
        arrays: dict[str, Any] = {each.name: numpy_helper.to_array(each).astype(np.float64) for each in graph.initializer}
        temperature = arrays["temperature"]
        weight = arrays["weight0"] / arrays["scale"]
        bias = arrays["bias0"] - weight @ arrays["mean"]
        return cls(
            weight=(weight / temperature).astype(np.float32),
            bias=(bias / temperature).astype(np.float32),
            classes=bundle.classes,
            name=bundle.name,
            sha256=bundle.files["head.onnx"],
            backbone=bundle.backbone,
            probe=str(bundle.fingerprint.leaves()["pixels.probe"]),
        )

    def require_features(self, loaded: Loaded, layer: str) -> None:
        """Refuse a head that takes other features than those of a network's layer.

        Raises:
            FingerprintMismatchError: names what differs.
        """
        pairs: dict[str, tuple[Any, Any]] = {
            "weights": (self.backbone.weights_sha256, loaded.weights_digest),
            "layer": (self.backbone.layer, layer),
            "preprocessing": (self.backbone.preprocess.facts(), loaded.preprocess.facts()),
        }
        wrong = [f"{name}: {short(a)} against {short(b)}" for name, (a, b) in pairs.items() if a != b]
        if wrong:
            message = (
                f"--init-head {self.name} takes other features than this network starts with; {'; '.join(wrong)}. "
                f"Its cache must be extracted with the same -m NAME, --weights and sizes"
            )
            raise FingerprintMismatchError(message)
        if self.probe != probe(loaded.preprocess):
            message = (
                f"--init-head {self.name} takes features of other pixels than this machine makes: the built-in test image "
                f"is decoded differently ({then_and_now({}, libraries())}). Extract its cache and train the head again here"
            )
            raise FingerprintMismatchError(message)


def start_from(bundle: Bundle, classes: Sequence[str], held_out: Iterable[bytes]) -> AffineHead:
    """Load the head of a bundle to start fine-tuning from, on the same samples.

    Args:
        classes: of the samples, in order.
        held_out: content digests of the images that will be reported on.

    Raises:
        BadDataError: it has other classes, or was fitted on images that are held out now.
        UsageError: as `AffineHead.of`.
    """
    head = AffineHead.of(bundle)
    if list(head.classes) != list(classes):
        odd = sorted(set(head.classes) ^ set(classes))
        message = f"--init-head {bundle.path} has other classes than these samples: {', '.join(odd[:5])} in only one of them"
        raise BadDataError(message)
    overlap = len(bundle.fitted() & set(held_out))
    if overlap:
        message = (
            f"--init-head {bundle.path} was fitted on {overlap} of the images that are held out here, so the scores would be "
            f"too good; train the head on the same split"
        )
        raise BadDataError(message)
    return head
