import pytest
from helpers import small_resnet

from dissect_monai.networks.optimizers import adamw, trained_part
from dissect_monai.networks.vqssl import VQSSLNet


def test_every_trainable_parameter_is_in_one_group_and_no_other() -> None:
    net = VQSSLNet(small_resnet(), num_embeddings=4, embedding_dim=8, hidden_dim=8, predict=True)
    grouped = [id(each) for group in adamw(net, 0.1, 0.1).param_groups for each in group["params"]]
    expected = {id(each) for each in net.parameters() if each.requires_grad}
    assert len(grouped) == len(expected)
    assert set(grouped) == expected
    assert not expected & {id(each) for each in net.target.parameters()}


def test_learning_rates_fall_from_the_head_to_the_stem() -> None:
    net = small_resnet(num_classes=3)
    groups = adamw(net, 0.1, 0.05, layer_decay=0.5).param_groups
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    expected = {"fc": 0.1, "layer4": 0.05, "layer3": 0.025, "layer2": 0.0125, "layer1": 0.00625}
    for name, parameter in net.named_parameters():
        assert rates[id(parameter)] == pytest.approx(expected.get(name.split(".")[0], 0.003125))
    assert len(rates) == len(list(net.parameters()))
    for group in groups:
        assert {parameter.ndim > 1 for parameter in group["params"]} == {group["weight_decay"] > 0}


def test_other_modes_train_the_whole_network() -> None:
    network = small_resnet(num_classes=3).train()
    assert trained_part(network, "finetune") is trained_part(network, "scratch") is network
    assert all(parameter.requires_grad for parameter in network.parameters())
    with pytest.raises(ValueError, match="`mode` must be one of linear_probe, finetune, scratch, got 'probe'"):
        trained_part(network, "probe")
