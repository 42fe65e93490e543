"""`python -m benchmarks.fastapi_peer MODEL PORT`: sentence-transformers behind FastAPI, written in ten minutes."""

import base64
import sys
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer


class EmbeddingsRequest(BaseModel):
    """OpenAI's request."""

    input: list[str]
    model: str = ""


def build(folder: str) -> FastAPI:
    """The application: a route in FastAPI's thread pool that calls `encode`."""
    app, model = FastAPI(), SentenceTransformer(folder, device="cpu")

    @app.get("/health")
    def health() -> dict[str, str]:
        return {}

    @app.post("/v1/embeddings")
    def embeddings(request: EmbeddingsRequest) -> dict[str, Any]:
        vectors = model.encode(request.input, normalize_embeddings=True, show_progress_bar=False)
        rows = [base64.b64encode(vector.tobytes()).decode() for vector in vectors]
        data = [{"object": "embedding", "embedding": row, "index": i} for i, row in enumerate(rows)]
        return {"object": "list", "model": request.model, "data": data}

    return app


if __name__ == "__main__":
    uvicorn.run(build(sys.argv[1]), port=int(sys.argv[2]), log_level="warning")
