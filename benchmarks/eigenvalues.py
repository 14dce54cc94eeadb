"""Largest Hessian eigenvalue of every state saved by ``minimizers.py``.

    python benchmarks/eigenvalues.py --model saq/resnet20 --weights FILE --data DIR --out results --images 250

All states are measured on the same training images. Use the same model, weights, data and output folder as for
``minimizers.py``. Each state is a line of ``results/eigenvalues.jsonl``; existing lines are not measured again.
``minimizers.py --table`` shows them next to the accuracies.
"""

import torch
from common import add_json, append, known, origin, read
from minimizers import METHODS, Prepared, arguments, key_of, state_path

from saqcli.analysis import INSTRUMENTS, AnalysisInput, Session, Settings
from saqcli.data.loaders import calibration_loader, read_all
from saqcli.progress import SILENT
from saqcli.quant.layer import quantized_layers
from saqcli.serialization import json_text


def main() -> None:
    """Measure missing results."""
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--starts", type=int, default=1)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    add_json(parser)
    wanted = parser.parse_args()
    results = wanted.out / "eigenvalues.jsonl"
    chosen = wanted.methods.split(";") if wanted.methods else list(METHODS)
    for bits in wanted.bits.split(","):
        prepared = None
        for seed in range(wanted.first_seed, wanted.first_seed + wanted.seeds):
            for method in chosen:
                key = key_of(wanted, bits, method, seed)
                path = state_path(wanted, key)
                if not path.is_file() or known(results, key):
                    continue
                prepared = prepared or Prepared(wanted, bits)
                model = prepared.network.model
                model.load_state_dict(torch.load(path, weights_only=True))
                images = prepared.images(prepared.config(method, 0))
                loader = calibration_loader(
                    images.train,
                    images.preprocessing,
                    batch_size=128,
                    workers=0,
                    device=prepared.device,
                    seed=0,
                    images=wanted.images,
                )
                batches = read_all(loader, SILENT, "measure on")
                subject = AnalysisInput(model.eval(), quantized_layers(model), batches)
                settings = Settings(starts=wanted.starts, tolerance=wanted.tolerance)
                reading = INSTRUMENTS["eigenvalue"].measure(subject, settings, Session())
                append(results, {**origin(wanted), **key, "images": subject.images, **reading.to_dict()})
    if wanted.json:
        print(json_text({"eigenvalues": read(results)}))


if __name__ == "__main__":
    main()
