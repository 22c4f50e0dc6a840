"""The ways in: the Dynamo backend, the hook into Dynamo, Inductor's pass, torch.export."""
