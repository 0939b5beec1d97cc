"""Figures as the content of a file, to be written whole or not at all."""

import io

import matplotlib.pyplot as plt


def encoded(figure: plt.Figure, kind: str, dpi: int) -> bytes:
    """The figure as "png" or "jpg"; it is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=dpi, pil_kwargs={"quality": 85} if kind == "jpg" else None)
    plt.close(figure)
    return buffer.getvalue()
