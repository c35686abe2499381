"""A small network on handwritten digits in plain PyTorch, as a federated training script."""

import argparse

import torch
from digits import Net, batches, site_data

import sfl.client as flare

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=1)
args = parser.parse_args()

flare.init()
x, y, x_test, y_test = site_data(flare.get_site_name())
net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
criterion = torch.nn.CrossEntropyLoss()

while flare.is_running():
    input_model = flare.receive()
    net.load_state_dict(input_model.params)

    net.eval()
    with torch.no_grad():
        scores = net(x_test)
        accuracy = float((scores.argmax(1) == y_test).float().mean())
        metrics = {"loss": float(criterion(scores, y_test)), "accuracy": accuracy}
    if flare.is_evaluate():
        flare.send(flare.FLModel(metrics=metrics))
        continue

    net.train()
    steps = 0
    for _ in range(args.epochs):
        for rows in batches(len(x)):
            optimizer.zero_grad()
            criterion(net(x[rows]), y[rows]).backward()
            optimizer.step()
            steps += 1
    meta = {"NUM_STEPS_CURRENT_ROUND": steps}
    flare.send(flare.FLModel(params=net.state_dict(), metrics=metrics, meta=meta))
