"""Serve an ONNX file of export.py without Detectron2: post an image, get JSON."""

import argparse
import io
import json
import sys
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from onnx_detector import OnnxDetector
from PIL import Image, ImageOps

EXAMPLE = "for example: curl --data-binary @image.jpg http://127.0.0.1:8000"
REFUSAL = "this is not a complete image with 8 bits per channel: post the bytes of a file"


class Handler(BaseHTTPRequestHandler):
    timeout = 10  # seconds to wait for a client

    def do_POST(self) -> None:
        image = None
        with suppress(Exception):  # Pillow may raise anything
            data = self.rfile.read(int(self.headers["Content-Length"]))
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        good = image is not None and image.mode[0] not in "IF"  # Pillow would clip 16 bits
        answer = detect(image, args.confidence_threshold) if good else {"error": REFUSAL}
        self.send_response(200 if good else 400)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"post an image to get detections; {EXAMPLE}\n".encode())


def score(text: str) -> float:
    """The `type` of an option that is a score from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise ValueError
    return float(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, epilog=f"Then, {EXAMPLE}")
    parser.add_argument("file", help="written by export.py, ending in .onnx")
    parser.add_argument("port", type=int, nargs="?", default=8000, help="0: any; default: 8000")
    parser.add_argument(
        "--confidence-threshold",
        type=score,
        metavar="SCORE",
        help="0 to 1; default: those of the classes in the file, otherwise 0.5",
    )
    args = parser.parse_args()
    try:
        detect = OnnxDetector(args.file)
        server = ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    except (ImportError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")
    except (OSError, OverflowError) as error:
        sys.exit(f"{parser.prog}: port {args.port} cannot be used, name another: {error}")
    with suppress(KeyboardInterrupt):
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()
