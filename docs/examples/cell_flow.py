"""CellFlow: one layer's map, the vector at each position through a flow. An example, from no paper."""

from collections.abc import Sequence

from anomalib.data import InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from torch import Tensor, nn

from anomalib_csflow import scoring
from anomalib_csflow.engine.arguments import check_arguments
from anomalib_csflow.engine.detector import FlowDetector
from anomalib_csflow.engine.images import ImageOptions
from anomalib_csflow.engine.model import FlowModel
from anomalib_csflow.engine.optimization import Noise, Schedule, TrainingOptions
from anomalib_csflow.features import FrozenLayers, LayerPyramid
from anomalib_csflow.flows import ChannelStandardization, ParallelFlow, PyramidFlow


def pointwise(in_channels: int, out_channels: int) -> nn.Module:
    """The network of a block: it sees one position at a time."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 64, 1),
        nn.ReLU(),
        nn.Conv2d(64, out_channels, 1),
    )


class CellFlowModel(FlowModel):
    """The network: features, an invertible flow, a score."""

    def __init__(self, features: LayerPyramid, num_blocks: int) -> None:
        dims = [(channels, 1, 1) for channels in features.channels]  # of any size
        flow = ParallelFlow(dims, subnets=[[pointwise] * num_blocks])
        super().__init__(features, PyramidFlow([ChannelStandardization(dims), flow]))

    def score(self, latents: Sequence[Tensor], size: tuple[int, int]) -> InferenceBatch:
        """The energy at each position, and its mean."""
        return InferenceBatch(
            pred_score=scoring.mean_energy(latents),
            anomaly_map=scoring.anomaly_map(scoring.mean_squares(latents), size),
        )


class CellFlow(FlowDetector):
    """CellFlow in anomalib."""

    output_arguments = ("layer", "num_blocks")
    model: CellFlowModel

    def __init__(
        self,
        backbone: str = "tf_efficientnet_lite2",
        layer: str = "blocks.4",
        weights: str = "package",
        image_size: int | tuple[int, int] = 256,
        antialias: bool = False,
        num_blocks: int = 4,
        lr: float = 1e-3,
        schedule: Schedule = "one_cycle",
        max_epochs: int | None = None,
        max_steps: int | None = None,
        noise: Noise = 0.0,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_arguments(locals())  # check others here too, before the backbone is built

        def build(network: nn.Module) -> CellFlowModel:
            return CellFlowModel(LayerPyramid(FrozenLayers(network, [layer])), num_blocks)

        images = ImageOptions(backbone, weights, image_size, antialias)
        training = TrainingOptions(lr, schedule, max_epochs, max_steps=max_steps, noise=noise)
        super().__init__(build, images, training, pre_processor, post_processor, evaluator, visualizer)
