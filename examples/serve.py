r"""A bundle behind LitServe: an image in, its verdict out.

pip install litserve
python examples/serve.py part_42
echo "{\"image\": \"$(base64 -w0 image.png)\"}" | curl -d @- -H "Content-Type: application/json" localhost:8000/predict
"""

import argparse
import base64
import io
from typing import Any

from fastapi import HTTPException
from litserve import LitAPI, LitServer
from PIL import Image

from anomalib_csflow.runtime import Detector, Result


class Judge(LitAPI):
    """Runs in each worker, which has the bundle for itself."""

    def __init__(self, bundle: str, num_threads: int | None) -> None:
        super().__init__()
        self.bundle, self.num_threads = bundle, num_threads

    def setup(self, device: str) -> None:
        """Open the bundle, once."""
        del device  # the runtime's is the processor
        self.detector = Detector(self.bundle, num_threads=self.num_threads)

    def predict(self, request: dict[str, str]) -> Result:
        """Judge one image; what is none is the client's error."""
        try:
            return self.detector(Image.open(io.BytesIO(base64.b64decode(request["image"], validate=True))))
        except (KeyError, OSError, ValueError) as error:
            raise HTTPException(400, f"give an image file in base64 as 'image' ({error})") from error

    def encode_response(self, result: Result) -> dict[str, Any]:
        """The verdict without its map."""
        return {name: getattr(result, name) for name in ("label", "score", "p_value", "boxes")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="a folder or a zip file")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 to be reached from other machines")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, help="of the processor, for each worker")
    given = parser.parse_args()
    server = LitServer(Judge(given.bundle, given.threads), accelerator="cpu", workers_per_device=given.workers)
    server.run(host=given.host, port=given.port, generate_client_file=False)
