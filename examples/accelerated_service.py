"""An existing sentence-transformers service, faster by one line.

    python examples/accelerated_service.py --check      # answers with and without the line, side by side
    python examples/accelerated_service.py --port 8000
    curl localhost:8000/embed -H 'Content-Type: application/json' -d '{"texts": ["a text"]}'

Everything but `fastbert.accelerate(model)` is the service as it was. A server that batches across clients is
`fastbert serve`.
"""

from __future__ import annotations

import argparse
import time

import fastapi
import numpy as np
import uvicorn
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

import fastbert
from fastbert.hub import resolve


class Request(BaseModel):
    """Texts to embed."""

    texts: list[str]


def service(model: SentenceTransformer) -> fastapi.FastAPI:
    """The routes."""
    app = fastapi.FastAPI()

    @app.post("/embed")
    def embed(request: Request) -> list[list[float]]:
        return model.encode(request.texts, normalize_embeddings=True).tolist()

    return app


def check(model: SentenceTransformer) -> None:
    """Encode the same texts by transformers and by fastbert: seconds, and the greatest difference."""
    texts = [f"Sentence number {i} " + "goes on and on " * (i % 12) for i in range(64)]
    seconds, vectors = {}, {}
    for name in ("fastbert", "transformers"):
        if name == "transformers":
            fastbert.restore(model)
        model.encode(texts[:8])  # the first call pays for threads and memory
        start = time.perf_counter()
        vectors[name] = model.encode(texts, normalize_embeddings=True)
        seconds[name] = time.perf_counter() - start
        print(f"{name:>12}: {len(texts) / seconds[name]:.0f} texts/s")
    print(f"greatest difference of a component: {np.abs(vectors['fastbert'] - vectors['transformers']).max():.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--check", action="store_true", help="compare, and stop")
    args = parser.parse_args()

    model = SentenceTransformer(str(resolve(args.model)), device="cpu")
    fastbert.accelerate(model)  # the one line
    if args.check:
        check(model)
    else:
        uvicorn.run(service(model), port=args.port)


if __name__ == "__main__":
    main()
