"""Requests per second and latency of awconv serve with batches, beside one image at a time.

python benchmarks/serving.py [SOURCE] [--clients 1,4,16] [--batch_size 8] [--rounds 7] [--requests 320] [-- OPTIONS]

Two servers run side by side, and are asked in turns by the same clients, which send scikit-learn's digits. Options
after -- are those of awconv serve, such as --image_size=64.
"""

from __future__ import annotations

import argparse
import http.client
import io
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from awconv.tables import Table


def pictures(count: int) -> list[bytes]:
    """Digits as PNG."""
    encoded = []
    for image in load_digits().images[:count]:
        file = io.BytesIO()
        Image.fromarray((image * 15).astype(np.uint8)).save(file, "PNG")
        encoded.append(file.getvalue())
    return encoded


@contextmanager
def server(source: str, batch_size: int, options: Sequence[str]) -> Iterator[int]:
    """The port of a server."""
    command = [
        sys.executable,
        "-m",
        "awconv",
        "serve",
        source,
        "--port=0",
        "--page=false",
        f"--batch_size={batch_size}",
    ]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            said = process.stderr.readline()
            port = re.search(r"http://[\d.]+:(\d+)", said)
            if port is None:
                raise RuntimeError(f"the server did not start: {said}")
            yield int(port[1])
        finally:
            process.terminate()


def asked(port: int, clients: int, requests: int, images: Sequence[bytes]) -> tuple[float, list[float]]:
    """Requests per second of all clients together, and the seconds of each request."""
    seconds: list[float] = []

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        for index in range(requests // clients):
            start = time.perf_counter()
            image = images[(number + clients * index) % len(images)]
            connection.request("POST", "/predict", body=image, headers={"Content-Type": "image/png"})
            response = connection.getresponse()
            content = response.read()
            if response.status != 200:
                raise RuntimeError(content.decode())
            seconds.append(time.perf_counter() - start)
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(seconds) != requests // clients * clients:
        raise RuntimeError("requests failed")
    return len(seconds) / (time.perf_counter() - start), seconds


def main(source: str, clients: Sequence[int], batch_size: int, rounds: int, requests: int, options: list[str]) -> None:
    """Prints the ratios."""
    images = pictures(100)
    rows = []
    with server(source, 1, options) as single, server(source, batch_size, options) as batched:
        for port in (single, batched):
            asked(port, max(clients), 10 * max(clients), images)  # the first requests take longer
        for count in clients:
            ratios, rates, latencies = [], ([], []), ([], [])
            for number in range(rounds):
                order = (0, 1) if number % 2 == 0 else (1, 0)
                for which in order:
                    rate, seconds = asked((single, batched)[which], count, requests, images)
                    rates[which].append(rate)
                    latencies[which].append(seconds)
                ratios.append(rates[1][-1] / rates[0][-1])
            middle, late = (
                [[1000 * float(np.quantile(seconds, share)) for seconds in each] for each in latencies]
                for share in (0.5, 0.95)
            )
            rows.append(
                (
                    str(count),
                    f"{median(rates[0]):.0f}",
                    f"{median(rates[1]):.0f}",
                    f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                    *(f"{median(one):.1f}" for pair in (middle, late) for one in pair),
                )
            )
    headings = ("clients", "one by one, /s", f"batches of {batch_size}, /s", "ratio", "median, ms", "in batches")
    Table((*headings, "95 %, ms", "in batches"), rows).print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="aw_resnet8_cifar.digits")
    parser.add_argument("--clients", type=lambda text: [int(part) for part in text.split(",")], default=[1, 4, 16])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=320)
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    main(**vars(parser.parse_args(sys.argv[1:end])), options=sys.argv[end + 1 :])
