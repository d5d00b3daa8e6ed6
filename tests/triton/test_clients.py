"""What existing clients send, tensor for tensor and line for line, and what they need back."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any, Protocol
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from triton_asks import SECONDS, Stream, is_final, tensor, texts, value
from tritonclient.utils import InferenceServerException

PROMPT = "What is machine learning?"


class Server(Protocol):
    grpc_address: str
    http_url: str


def post(server: Server, path: str, body: dict[str, Any]) -> Any:
    """The response to a POST of JSON to the ensemble."""
    url = f"{server.http_url}/v2/models/ensemble/{path}"
    return urlopen(Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"}), timeout=SECONDS)


def curl(server: Server, path: str, data: str) -> tuple[int, dict[str, Any]]:
    """Status and body, as the documented command lines get them."""
    command = ["curl", "-s", "-w", "\n%{http_code}", "-X", "POST", f"{server.http_url}/v2/models/ensemble/{path}", "-d"]
    out = subprocess.run([*command, data], capture_output=True, text=True, timeout=SECONDS, check=True).stdout
    body, _, status = out.rpartition("\n")
    return int(status), json.loads(body)


# --- genai-perf -----------------------------------------------------------------------------------------------------


class GenaiPerf:
    """perf_analyzer over gRPC: asks for the model's metadata, then streams."""

    def __init__(self, server: Server) -> None:
        self.address = server.grpc_address
        with grpcclient.InferenceServerClient(self.address) as client:
            assert client.get_server_metadata(as_json=True)["name"]
            metadata = client.get_model_metadata("ensemble", as_json=True)
            config = client.get_model_config("ensemble", as_json=True)["config"]
            assert client.get_inference_statistics("ensemble", as_json=True)
            assert config["model_transaction_policy"]["decoupled"]
            for step in config["ensemble_scheduling"]["step"]:
                assert client.get_model_config(step["model_name"], as_json=True)["config"]["name"]
        self.inputs = {given["name"]: given for given in metadata["inputs"]}
        self.outputs = [given["name"] for given in metadata["outputs"]]
        self.required = {given["name"] for given in config["input"] if not given.get("optional")}

    def ask(self, request_id: str, data: dict[str, list[Any]]) -> list[grpcclient.InferResult]:
        """Sends what a line of inputs.json has, as perf_analyzer makes tensors of it; returns all responses."""
        assert self.required <= data.keys(), "perf_analyzer: missing tensor"
        inputs = []
        for name, values in data.items():
            assert name in self.inputs, f"perf_analyzer: {name} is not found in the model configuration"
            shape = [int(size) for size in self.inputs[name]["shape"]]
            assert shape[0] == -1 and -1 not in shape[1:]
            inputs.append(tensor(name, self.inputs[name]["datatype"], *values, shape=[1, *shape[1:]]))
        outputs = [grpcclient.InferRequestedOutput(name) for name in self.outputs]
        with Stream(self.address) as stream:
            stream.send(*inputs, outputs=outputs, request_id=request_id, enable_empty_final_response=True)
            results = [stream.next()]
            while not is_final(results[-1]):
                results.append(stream.next())
            assert stream.is_silent(), "a response after the final one"
        assert [result.get_response().id for result in results] == [request_id] * len(results)
        return results


@pytest.mark.parametrize("streaming", [True, False])
def test_genai_perf_tensorrtllm(server: Server, streaming: bool) -> None:
    data = {"text_input": [PROMPT], "max_tokens": [24], "min_length": [24], "exclude_input_in_output": [True]}
    results = GenaiPerf(server).ask("17", data | ({"stream": [True]} if streaming else {}))
    assert sum(value(result, "num_output_tokens") for result in results) == 24
    assert value(results[0], "num_input_tokens") > 0
    assert value(results[0], "text_output"), "its time would be taken for that of the first token"
    assert (len(results) > 1) == streaming
    assert [value(result, "finish_reason") for result in results] == [""] * (len(results) - 1) + ["length"]


@pytest.mark.parametrize("streaming", [True, False])
def test_genai_perf_vllm(server: Server, streaming: bool) -> None:
    given = json.dumps({"max_tokens": "20", "min_tokens": "20"})
    data = {"text_input": [PROMPT], "exclude_input_in_output": [True], "sampling_parameters": [given]}
    results = GenaiPerf(server).ask("3", data | ({"stream": [True]} if streaming else {}))
    assert sum(value(result, "num_output_tokens") for result in results) == 20
    assert (len(results) > 1) == streaming


def test_genai_perf_vllm_with_extra_inputs(server: Server) -> None:
    data = {"text_input": [PROMPT], "exclude_input_in_output": [True], "stream": [True]}
    extra = {"max_tokens": [16], "ignore_eos": [True], "temperature": [0.0]}
    results = GenaiPerf(server).ask("0", data | extra)
    assert sum(value(result, "num_output_tokens") for result in results) == 16


def test_genai_perf_with_defaults_only(server: Server) -> None:
    results = GenaiPerf(server).ask(
        "9", {"text_input": ["The capital of France is"], "exclude_input_in_output": [True]}
    )
    assert len(results) == 1
    assert value(results[0], "text_output")


def test_genai_perf_triton_generate(server: Server) -> None:
    """Its text is a list of one."""
    body = {"text_input": [PROMPT], "stream": True, "max_tokens": 12}
    with post(server, "generate_stream", body) as response:
        lines = [line.decode().strip() for line in response]
    assert "".join(json.loads(line.removeprefix("data:"))["text_output"] for line in lines if line)


# --- other gRPC clients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [True, False])
def test_openai_frontend_in_the_format_for_tensorrtllm(server: Server, streaming: bool) -> None:
    inputs = [
        tensor("text_input", "BYTES", PROMPT),
        tensor("stream", "BOOL", streaming),
        tensor("max_tokens", "INT32", 16),
        tensor("top_p", "FP32", 1.0),
        tensor("temperature", "FP32", 1.0),
        tensor("frequency_penalty", "FP32", 0.0),
        tensor("presence_penalty", "FP32", 0.0),
        tensor("seed", "UINT64", 2**63 + 5),
        tensor("stop_words", "BYTES", "never said", "nor this"),
        tensor("exclude_input_in_output", "BOOL", True),
        tensor("return_num_input_tokens", "BOOL", True),
        tensor("return_num_output_tokens", "BOOL", True),
    ]
    with Stream(server.grpc_address) as stream:
        stream.send(*inputs, enable_empty_final_response=True)
        results = stream.rest()
        assert stream.is_silent()
    assert is_final(results[-1]) and not any(map(is_final, results[:-1]))
    assert (len(results) > 1) == streaming
    assert all(result.as_numpy("text_output").size == 1 for result in results)
    assert 0 < sum(value(result, "num_output_tokens") for result in results) <= 16
    assert {
        result.as_numpy(name).dtype for result in results for name in ("num_input_tokens", "num_output_tokens")
    } == {np.dtype(np.int32)}


def test_end_to_end_client_of_tensorrtllm(server: Server) -> None:
    """It sends beam_width whatever it is asked to do."""
    inputs = [
        tensor("text_input", "BYTES", PROMPT),
        tensor("max_tokens", "INT32", 16),
        tensor("stream", "BOOL", True),
        tensor("beam_width", "INT32", 1),
        tensor("temperature", "FP32", 1.0),
        tensor("exclude_input_in_output", "BOOL", True),
        tensor("num_return_sequences", "INT32", 1),
    ]
    with Stream(server.grpc_address) as stream:
        stream.send(*inputs, outputs=[grpcclient.InferRequestedOutput("text_output")], request_id="1")
        first = stream.next()
        assert isinstance(first.as_numpy("text_output").reshape(-1)[0], bytes)


def test_end_to_end_client_of_tensorrtllm_without_beams(server: Server) -> None:
    inputs = [
        tensor("text_input", "BYTES", PROMPT),
        tensor("max_tokens", "INT32", 16),
        tensor("stream", "BOOL", True),
        tensor("temperature", "FP32", 1.0),
        tensor("exclude_input_in_output", "BOOL", True),
        tensor("stop_words", "BYTES", "never said"),
        tensor("bad_words", "BYTES", ""),
        tensor("repetition_penalty", "FP32", 1.0),
        tensor("presence_penalty", "FP32", 0.0),
        tensor("frequency_penalty", "FP32", 0.0),
        tensor("end_id", "INT32", 2),
        tensor("pad_id", "INT32", 2),
        tensor("return_perf_metrics", "BOOL", True),
    ]
    names = ("text_output", "acceptance_rate", "total_accepted_draft_tokens", "total_draft_tokens", "finish_reason")
    with Stream(server.grpc_address) as stream:
        stream.send(*inputs, outputs=[grpcclient.InferRequestedOutput(name) for name in names], request_id="1")
        results = stream.rest()
    assert isinstance(texts(results), str)  # sampled without a seed: it may be empty
    assert 0 <= value(results[-1], "acceptance_rate") <= 1
    assert value(results[-1], "total_accepted_draft_tokens") <= value(results[-1], "total_draft_tokens")


def test_example_client_of_vllm_in_our_ranks(server: Server) -> None:
    """Its settings as one JSON of texts, and again as parameters of the request."""
    given = {"temperature": "0.1", "top_p": "0.95", "max_tokens": "20"}
    inputs = [
        tensor("text_input", "BYTES", PROMPT),
        tensor("stream", "BOOL", True),
        tensor("sampling_parameters", "BYTES", json.dumps(given)),
    ]
    outputs = [grpcclient.InferRequestedOutput("text_output"), grpcclient.InferRequestedOutput("finish_reason")]
    with Stream(server.grpc_address) as stream:
        stream.send(*inputs, outputs=outputs, request_id="5", parameters=given)
        assert value(stream.rest()[-1], "finish_reason") in ("stop", "length")


# --- bench clients over HTTP ----------------------------------------------------------------------------------------


def bench_lines(server: Server, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Reads a stream as sglang's and vLLM's bench clients do: every line that is not blank is JSON with a text."""
    with post(server, "generate_stream", body) as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/event-stream")
        for line in response:
            if line := line.strip():
                data = json.loads(line.decode().removeprefix("data:"))
                assert isinstance(data["text_output"], str)
                yield data


def test_bench_client_of_sglang(server: Server) -> None:
    body = {
        "accumulate_tokens": True,
        "text_input": PROMPT,
        "temperature": 0.000001,
        "top_p": 1.0,
        "max_tokens": 30,
        "stream": True,
        "min_length": 30,
        "end_id": 1048576,
    }
    found = list(bench_lines(server, body))
    assert sum(data["num_output_tokens"] for data in found) == 30
    assert found[0]["text_output"]
    with post(server, "generate", body | {"stream": False}) as response:
        assert json.load(response)["text_output"] == "".join(data["text_output"] for data in found)


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_bench_client_of_vllm(server: Server, ignore_eos: bool) -> None:
    body: dict[str, Any] = {"accumulate_tokens": True, "text_input": PROMPT, "temperature": 0.0, "top_p": 1.0}
    body |= {"max_tokens": 30, "stream": True} | ({"min_length": 30} if ignore_eos else {})
    found = list(bench_lines(server, body))
    assert sum(data["num_output_tokens"] for data in found) <= 30
    if ignore_eos:
        assert sum(data["num_output_tokens"] for data in found) == 30


# --- curl -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        '{"text_input": "The future of AI is", "max_tokens": 20, "bad_words": "", "stop_words": ""}',
        '{"text_input": "The future of AI is", "max_tokens": 20, "bad_words": "", "stop_words": "", '
        '"pad_id": 2, "end_id": 2}',
        '{"text_input": "The future of AI is", "max_tokens": 20, "bad_words": [], '
        '"stop_words": ["focuses", "learn"], "end_id": 2}',
        '{"text_input": "The future of AI is", "max_tokens": 10}',
        '{"text_input": "The future of AI is", "max_tokens": 10, "parameters": {"stream": false, "temperature": 0}}',
        '{"text_input": "The future of AI is", "stream": false, '
        '"sampling_parameters": "{\\"temperature\\": 0, \\"max_tokens\\": 9}"}',
    ],
)
def test_documented_curl(server: Server, data: str) -> None:
    status, body = curl(server, "generate", data)
    assert status == 200, body
    assert isinstance(body["text_output"], str) and body["text_output"]
    assert body["model_name"] == "ensemble"
    assert body["num_output_tokens"] <= 20


def test_documented_curl_of_a_stream(server: Server) -> None:
    data = '{"text_input": "The future of AI is", "max_tokens": 12, "parameters": {"stream": true, "temperature": 0}}'
    url = f"{server.http_url}/v2/models/ensemble/generate_stream"
    out = subprocess.run(
        ["curl", "-s", "-X", "POST", url, "-d", data], capture_output=True, timeout=SECONDS, check=True
    )
    events = out.stdout.decode().split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: ") for event in events)
    assert len(events) > 1
    with post(server, "generate", json.loads(data) | {"parameters": {"temperature": 0}}) as response:
        whole = json.load(response)["text_output"]
    assert "".join(json.loads(event.removeprefix("data: "))["text_output"] for event in events) == whole


def test_curl_with_options_of_a_method(server: Server) -> None:
    """They are a text, as Triton has no type for an object."""
    asked = {"text_input": "The sea is", "max_tokens": 8, "ignore_eos": True, "ssv_tier": "eagle"}
    drafted = [
        curl(server, "generate", json.dumps(asked | fields))[1]["ssv_draft_tokens"]
        for fields in ({}, {"ssv_policy": '{"max_pending": 4, "max_depth": 2}'})
    ]
    assert 0 < drafted[1] <= 4 * 8 < drafted[0]
    status, body = curl(server, "generate", json.dumps(asked | {"ssv_policy": '{"beam": 0}'}))
    assert status == 400 and "ssv_policy: beam: Input should be greater" in body["error"]


def test_curl_with_bad_words_gets_an_answer_without_them(server: Server) -> None:
    asked = {"text_input": "What is ML?", "max_tokens": 20}
    texts = [
        curl(server, "generate", json.dumps(asked | fields))[1]["text_output"]
        for fields in ({}, {"bad_words": ["learning", "a", "the"]})
    ]
    assert texts[0] != texts[1] and not {"learning", "a", "the"} & set(texts[1].split())


def test_curl_with_a_schema_gets_json_of_it(server: Server) -> None:
    """As clients of TensorRT-LLM's backend ask for it."""
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    schema["additionalProperties"] = False
    guide = {"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": json.dumps(schema)}
    status, body = curl(server, "generate", json.dumps({"text_input": "Is it?", "max_tokens": 20, **guide}))
    assert status == 200
    assert list(json.loads(body["text_output"])) == ["yes"]


def test_no_stream_asked_for_over_generate_stream(server: Server) -> None:
    found = list(bench_lines(server, {"text_input": PROMPT, "max_tokens": 10}))
    assert len(found) == 1


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (("repetition_penalty", "FP32", 0.0), "repetition_penalty 0.0 must be between"),
        (("presence_penalty", "FP32", 2.5), "presence_penalty 2.5 must be between"),
        (("ssv_tier", "BYTES", "gold"), "ssv_tier 'gold' is unknown"),
        (("max_tokens", "INT32", 100000), "max_tokens 100000"),
        (("temperature", "FP32", -1.0), "temperature -1.0"),
        (("text_input", "BYTES", b"\xff"), "text_input is not valid UTF-8"),
        (("text_input", "BYTES", ""), "the prompt is empty"),
        (("sampling_parameters", "BYTES", "{"), "sampling_parameters is not valid JSON"),
    ],
)
def test_what_cannot_be_served_is_said(server: Server, wrong: tuple[str, str, Any], says: str) -> None:
    inputs = {"text_input": tensor("text_input", "BYTES", PROMPT), wrong[0]: tensor(*wrong)}
    with Stream(server.grpc_address) as stream:
        stream.send(*inputs.values())
        with pytest.raises(InferenceServerException, match=f"INVALID_ARGUMENT: .*{says}"):
            stream.next()


def test_a_stream_outlives_an_error(server: Server) -> None:
    with Stream(server.grpc_address) as stream:
        stream.send(tensor("text_input", "BYTES", PROMPT), tensor("ssv_tier", "BYTES", "gold"))
        with pytest.raises(InferenceServerException, match="gold"):
            stream.next()
        stream.send(tensor("text_input", "BYTES", PROMPT), tensor("max_tokens", "INT32", 3))
        assert value(stream.next(), "num_output_tokens") == 3


@pytest.mark.parametrize("path", ["generate", "generate_stream"])
def test_errors_over_http(server: Server, path: str) -> None:
    with pytest.raises(HTTPError) as raised:
        post(server, path, {"text_input": PROMPT, "ssv_tier": "gold"})
    assert raised.value.code == 400
    body = json.loads(raised.value.read().decode().removeprefix("data:"))
    assert "ssv_tier 'gold' is unknown" in body["error"]


@pytest.mark.parametrize("given", [{"stream": True}, {"parameters": {"stream": True}}])
def test_generate_has_no_stream_and_says_what_has(server: Server, given: dict[str, Any]) -> None:
    with pytest.raises(HTTPError) as raised:
        post(server, "generate", {"text_input": PROMPT, "max_tokens": 3, **given})
    assert raised.value.code == 400
    assert "ask /v2/models/ensemble/generate_stream" in json.load(raised.value)["error"]


@pytest.mark.parametrize("path", ["generate", "generate_stream"])
def test_what_is_no_json_is_the_clients_mistake(server: Server, path: str) -> None:
    with pytest.raises(HTTPError) as raised:
        urlopen(Request(f"{server.http_url}/v2/models/ensemble/{path}", b"nonsense"), timeout=SECONDS)
    assert raised.value.code == 400


MISSING = "text_input is missing: give a prompt"


@pytest.mark.parametrize("given", [{"max_tokens": 3}, {"max_tokens": 3, "stream": True}, {"ssv_timeout": 2.0}])
@pytest.mark.parametrize("path", ["generate", "generate_stream"])
def test_http_without_a_prompt_is_an_error_at_once(server: Server, path: str, given: dict[str, Any]) -> None:
    with pytest.raises(HTTPError) as raised:
        post(server, path, given)
    assert raised.value.code == 400
    assert MISSING in json.loads(raised.value.read().decode().removeprefix("data:"))["error"]


@pytest.mark.parametrize("path", ["generate", "generate_stream"])
def test_http_with_nothing_at_all_is_an_error_at_once(server: Server, path: str) -> None:
    for body in ({}, {"max_token": 3}):
        with pytest.raises(HTTPError) as raised:
            post(server, path, body)
        assert raised.value.code == 400


@pytest.mark.parametrize("model", ["ensemble", "ab_router"])
@pytest.mark.parametrize("stream", [True, False])
def test_grpc_without_a_prompt_is_an_error_at_once(server: Server, model: str, stream: bool) -> None:
    with Stream(server.grpc_address) as client:
        client.send(tensor("stream", "BOOL", stream), tensor("max_tokens", "INT32", 3), model=model)
        with pytest.raises(InferenceServerException, match=MISSING):
            client.next()
        client.send(model=model)
        with pytest.raises(InferenceServerException):
            client.next()


@pytest.mark.parametrize("model", ["ensemble", "ab_router"])
def test_messages_are_a_prompt(server: Server, model: str) -> None:
    messages = tensor("ssv_messages", "BYTES", json.dumps([{"role": "user", "content": "Hi"}]))
    with Stream(server.grpc_address) as stream:
        stream.send(messages, tensor("max_tokens", "INT32", 3), model=model)
        assert value(stream.next(), "num_output_tokens") == 3


@pytest.mark.parametrize("path", ["generate", "generate_stream"])
@pytest.mark.parametrize(
    ("field", "given", "says"),
    [
        ("max_token", 3, "'max_token' is unknown: use max_tokens"),
        ("max_new_tokens", 3, "use max_tokens"),
        ("n", 2, "'n' is unknown: leave it out, and ask once for each output"),
        ("nonsense", "x", "'nonsense' is unknown: leave it out"),
        ("stop", "END", "'stop' is unknown: use stop_words"),
        ("stop", ["END"], "stop"),
        ("lora", {"5": 1}, "lora"),
    ],
)
def test_unknown_fields_are_refused_by_name(server: Server, path: str, field: str, given: Any, says: str) -> None:
    with pytest.raises(HTTPError) as raised:
        post(server, path, {"text_input": PROMPT, "max_tokens": 3, field: given})
    assert raised.value.code == 400
    assert says in raised.value.read().decode()


@pytest.mark.parametrize("model", ["ensemble", "ab_router"])
def test_unknown_parameters_over_grpc_are_refused_by_name(server: Server, model: str) -> None:
    with Stream(server.grpc_address) as stream:
        stream.send(tensor("text_input", "BYTES", PROMPT), model=model, parameters={"max_token": 3})
        with pytest.raises(InferenceServerException, match="'max_token' is unknown: use max_tokens"):
            stream.next()
        stream.send(tensor("text_input", "BYTES", PROMPT), model=model, parameters={"max_tokens": 3})
        assert value(stream.next(), "num_output_tokens") == 3


def test_an_id_is_no_unknown_field(server: Server) -> None:
    with post(server, "generate", {"id": "mine", "text_input": PROMPT, "max_tokens": 3}) as response:
        assert json.load(response)["id"] == "mine"


def test_unknown_tensor(server: Server) -> None:
    with Stream(server.grpc_address) as stream:
        stream.send(tensor("text_input", "BYTES", PROMPT), tensor("nonsense", "INT32", 1))
        with pytest.raises(InferenceServerException, match="nonsense"):
            stream.next()
