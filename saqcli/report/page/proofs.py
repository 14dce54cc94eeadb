"""The proof of an exported file, in sentences for a reader who has never seen one."""

from dataclasses import dataclass

from saqcli.export import is_bit_equal
from saqcli.report.page.contents import VerdictFile
from saqcli.units import counted, format_quantity

SHOWN_OF_HASH = 16


@dataclass(frozen=True)
class Claim:
    """A sentence of a proof under a short head."""

    head: str
    text: str


@dataclass(frozen=True)
class Proof:
    """The proof of a file.

    Attributes:
        file: its name.
        style: of the export.
        size: of the file, in words.
        verified: whether it equals the model.
        claims: what was found.
        hash: beginning of its SHA-256.
        note: why it is larger than the model at its true bits; None if it is not.
    """

    file: str
    style: str
    size: str
    verified: bool
    claims: list[Claim]
    hash: str
    note: str | None


def proof_of(verdict: VerdictFile) -> Proof:
    """The proof that ``verdict`` holds, in words."""
    return Proof(
        file=verdict.file,
        style=verdict.style,
        size=format_quantity(verdict.size_bytes, "B"),
        verified=verdict.verified,
        claims=list(_claims(verdict)),
        hash=verdict.sha256[:SHOWN_OF_HASH],
        note=verdict.size_note,
    )


def _claims(verdict: VerdictFile) -> list[Claim]:
    images = counted(verdict.images, "image")
    if verdict.images_available and verdict.images_available > verdict.images:
        images += f" of {verdict.images_available:,}"
    agreement = f"{100 * verdict.argmax_agreement:.2f} %"
    found = []
    if is_bit_equal(verdict.style):
        equal = "Every logit equals that of the model's exact form, to the last bit"
        if verdict.max_abs_diff:
            equal = f"Logits differ from the model's exact form by up to {verdict.max_abs_diff:.3g}"
        found.append(
            Claim("Bit for bit", f"{equal}, on {images}. The best class is the same on {agreement}.")
        )
    else:
        if verdict.layers:
            found.append(Claim("Layer by layer", _layers(verdict)))
        text = f"The best class is that of the model in double precision on {agreement} of {images}."
        if verdict.pytorch_max_abs_diff is not None and verdict.max_abs_diff is not None:
            text += (
                f" Logits differ from it by up to {verdict.max_abs_diff:.3g}; those of PyTorch in single precision by "
                f"up to {verdict.pytorch_max_abs_diff:.3g}."
            )
        found.append(Claim("End to end", text))
    twin = verdict.twin
    if twin is not None and twin.skipped is None:
        text = (
            "Integer kernels returned, bit by bit, what their arithmetic predicts."
            if twin.equal
            else "Integer kernels returned other numbers than their arithmetic predicts."
        )
        found.append(Claim("In ONNX Runtime", text))
    if verdict.exact_by_construction:
        text = "No sum of the graph depends on its order, so that every runtime must return the same numbers."
        found.append(Claim("By construction", text))
    if verdict.moved_codes is not None and verdict.moved_codes.codes:
        share = 100 * verdict.moved_codes.differing / verdict.moved_codes.codes
        text = f"Rounding biases to integers moves {share:.3g} % of all codes of the trained model."
        found.append(Claim("Deployed form", text))
    for name, figures in verdict.runtimes.items():
        if (agrees := figures.get("argmax_agreement")) is not None:
            found.append(
                Claim(f"In {name}", f"The best class is the same on {100 * agrees:.2f} % of {images}.")
            )
    found += [Claim("Condition", f"{line[0].upper()}{line[1:]}.") for line in verdict.conditions if line]
    return found


def _layers(verdict: VerdictFile) -> str:
    layers = "Its one layer" if verdict.layers == 1 else f"Each of its {verdict.layers} layers"
    codes = "None" if not verdict.flipped_codes else f"{verdict.flipped_codes:,}"
    return (
        f"{layers}, fed the codes that PyTorch feeds it, returns what PyTorch returns, to "
        f"{verdict.layers_error:.1e} of its range. {codes} of {counted(verdict.codes, 'code')} rounded the other way."
    )
