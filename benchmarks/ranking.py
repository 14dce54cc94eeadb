"""How many images rank configurations: rank correlation with all images.

    python benchmarks/ranking.py --model saq/resnet20 --weights FILE --data DIR --out ranking

Random configurations that use the budget are calibrated and evaluated on all held-out images of a search. Top-1 and
loss on the first 256, 512, ... images are compared with top-1 and loss on all images by Spearman's rank correlation,
and also the loss on few images with the top-1 on all. Results are stored in OUT and not measured again: use a separate
OUT for each network, budget and data set.
"""

import copy
from pathlib import Path

import torch
from common import add_json, parser, show
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F

from saqcli.config import resolve
from saqcli.pipelines.bits import budget_of, scheme_of, space_of
from saqcli.pipelines.calibration import calibrate
from saqcli.pipelines.proxy import search_images
from saqcli.pipelines.search import prepare_search
from saqcli.process_group import pick_device
from saqcli.progress import SILENT
from saqcli.searchers.knapsack import Sampler
from saqcli.searchers.problem import SearchProblem
from saqcli.searchers.supernet import Supernet
from saqcli.serialization import make_folder, replacing

SIZES = (256, 512, 1024, 2048, 4096)


def main() -> None:
    """Evaluate, compare, and print one line per number of images."""
    options = parser(__doc__)
    options.add_argument("--budget", default="w3a3")
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--configurations", type=int, default=40)
    options.add_argument("--quick", action="store_true", help="8 configurations")
    add_json(options)
    wanted = options.parse_args()
    if wanted.quick:
        wanted.configurations = 8
    config = resolve(
        options={
            "model.name": wanted.model,
            "model.weights": wanted.weights,
            "data.path": wanted.data,
            "quantization.bops": wanted.budget,
            "search.scoring_images": 10**9,
        }
    )
    network, images = prepare_search(config, pick_device("auto"), SILENT)
    assert images is not None
    space, budget = space_of(config.quantization, network), budget_of(config.quantization, network)
    problem = SearchProblem(
        model=copy.deepcopy(network.model),
        space=space,
        budget=budget,
        scheme=scheme_of(config.quantization),
        statistics=calibrate(network, images, config, SILENT),
        images=search_images(images, config.search, SILENT),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    )
    supernet = Supernet(problem)
    choices = Sampler(space, budget, torch.Generator().manual_seed(0)).draw_distinct(wanted.configurations)
    make_folder(wanted.out)
    rows = (cached(wanted.out, supernet, choice) for choice in choices)
    losses, right = (torch.stack(each) for each in zip(*rows, strict=True))
    count = losses.shape[1]
    table = [
        f"{len(choices)} configurations, {count} held-out images",
        "| images | top-1 with top-1 on all | loss with loss on all | loss with top-1 on all |",
        "|--|--|--|--|",
    ]
    correlations = {}
    for size in (*(size for size in SIZES if size < count), count):
        pairs = ((right, right), (losses, losses), (losses, -right))
        found = [spearmanr(some[:, :size].mean(1), every.mean(1)).statistic for some, every in pairs]
        table.append(f"| {size} | " + " | ".join(f"{value:.3f}" for value in found) + " |")
        correlations[str(size)] = dict(zip(("top1", "loss", "loss_top1"), map(float, found), strict=True))
    result = {"configurations": len(choices), "images": count, "correlations": correlations}
    show(wanted, result, "\n".join(table))


def cached(out: Path, supernet: Supernet, choice: list[int]) -> tuple[Tensor, Tensor]:
    """The result of ``evaluated``, read from ``out`` if it exists there."""
    path = out / f"{'-'.join(map(str, choice))}.pt"
    if not path.is_file():
        with replacing(path) as temporary:
            torch.save(evaluated(supernet, choice), temporary)
    losses, right = torch.load(path, weights_only=True)
    return losses, right


@torch.no_grad()
def evaluated(supernet: Supernet, choice: list[int]) -> tuple[Tensor, Tensor]:
    """Loss and correctness (0 or 1) of every held-out image."""
    supernet.select(choice)
    model = supernet.model.eval()
    losses, right = [], []
    for images, labels in supernet.problem.images.scoring:
        logits = model(images)
        losses.append(F.cross_entropy(logits, labels, reduction="none").double().cpu())
        right.append((logits.argmax(1) == labels).double().cpu())
    return torch.cat(losses), torch.cat(right)


if __name__ == "__main__":
    main()
