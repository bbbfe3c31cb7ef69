"""Serve an ONNX file of export.py without Detectron2: an image is posted, JSON is the answer."""

import io
import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def detect(image: Image.Image) -> list[dict]:
    (height, width), names = about["size"], about["classes"]
    scale = min(height / image.height, width / image.width)
    h, w = max(1, round(image.height * scale)), max(1, round(image.width * scale))
    pixels = np.zeros((about["batch_size"] or 1, height, width, 3), np.uint8)
    pixels[:, :h, :w] = image.resize((w, h), Image.Resampling.BILINEAR)
    pixels = (pixels if about["image_format"] == "RGB" else pixels[..., ::-1]).transpose(0, 3, 1, 2)
    found = session.run(None, {"images": pixels, "image_sizes": np.array([[h, w]] * len(pixels))})
    boxes = found[0][0] * np.float32([image.width / w, image.height / h] * 2)
    rows = zip(boxes.tolist(), found[1][0].tolist(), found[2][0], strict=True)
    return [{"class": names[c], "score": s, "box": b} for b, s, c in rows if s >= 0.3]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        try:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        except Exception:  # Pillow raises anything
            status, answer = 400, {"error": "this is no whole image: post the bytes of a file"}
        else:
            status, answer = 200, detect(image)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())


if __name__ == "__main__":
    try:
        session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
        about = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
        server = HTTPServer(("127.0.0.1", int((sys.argv[2:] or ["8000"])[0])), Handler)
    except Exception as error:
        sys.exit(f"serve_onnx.py FILE [PORT]: FILE has to be one that export.py wrote: {error}")
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
