//! Bodies as clients send them, good and bad.

use serde_json::json;

use super::*;

fn chat(extra: &Value) -> Result<Ask, ApiError> {
    let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    for (name, value) in extra.as_object().unwrap() {
        body[name] = value.clone();
    }
    Ask::parse(Endpoint::Chat, body.to_string().as_bytes())
}

fn completion(body: &Value) -> Result<Ask, ApiError> {
    Ask::parse(Endpoint::Completions, body.to_string().as_bytes())
}

/// Defaults must be OpenAI's, or a moved client gets other answers than before.
#[test]
fn defaults_are_openais() {
    let ask = chat(&json!({})).unwrap();
    assert_eq!((ask.temperature, ask.top_p, ask.seed, ask.tokens_max), (0.0, 1.0, None, None));
    assert_eq!(ask.delivery, Delivery::Whole);
    let ask = completion(&json!({"prompt": "x"})).unwrap();
    assert_eq!((ask.tokens_max, ask.model), (Some(16), None));
}

/// A prompt may be written in five ways; each must mean the same to us as to OpenAI.
#[test]
fn prompts_are_read_in_every_form() {
    let prompt = |value: Value| completion(&json!({"prompt": value})).map(|ask| ask.prompt);
    assert_eq!(prompt(json!("a")).unwrap(), Prompt::Text("a".to_owned()));
    assert_eq!(prompt(json!(["a"])).unwrap(), Prompt::Text("a".to_owned()));
    assert_eq!(prompt(json!([1, 2])).unwrap(), Prompt::Tokens(vec![1, 2]));
    assert_eq!(prompt(json!([[1, 2]])).unwrap(), Prompt::Tokens(vec![1, 2]));
    for bad in
        [json!(["a", "b"]), json!([1, "a"]), json!([-1]), json!([1.5]), json!({}), json!([4_294_967_296u64])]
    {
        assert_eq!(prompt(bad.clone()).unwrap_err().param.as_deref(), Some("prompt"), "{bad}");
    }
    let parts = json!({"messages": [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]});
    let expected = Message { role: "system".to_owned(), content: "ab".to_owned() };
    assert_eq!(chat(&parts).unwrap().prompt, Prompt::Messages(vec![expected]));
}

/// Broken and senseless bodies must each get a 400 that names the field, never a panic or a guess.
#[test]
fn senseless_values_are_refused_by_name() {
    let cases = [
        (json!({"temperature": 2.5}), "temperature"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": -5}), "max_tokens"),
        (json!({"max_completion_tokens": 1.5}), "max_completion_tokens"),
        (json!({"seed": "x"}), "seed"),
        (json!({"seed": 1.5}), "seed"),
        (json!({"stop": ["a", "b", "c", "d", "e"]}), "stop"),
        (json!({"stop": ["a", 1]}), "stop"),
        (json!({"stop": ""}), "stop"),
        (json!({"stream": "yes"}), "stream"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"model": 5}), "model"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": "hi"}), "messages"),
        (json!({"messages": [{"content": "hi"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
        (json!({"messages": [7]}), "messages[0].role"),
    ];
    for (extra, param) in cases {
        let error = chat(&extra).unwrap_err();
        assert_eq!(error.status, StatusCode::BAD_REQUEST, "{extra}");
        assert_eq!(error.param.as_deref(), Some(param), "{extra}: {error}");
    }
    for text in ["", "{", "[]", "\"x\"", "{\"messages\": nul}", "\u{0}"] {
        let error = Ask::parse(Endpoint::Chat, text.as_bytes()).unwrap_err();
        assert_eq!((error.status, error.code), (StatusCode::BAD_REQUEST, Some("invalid_json")), "{text:?}");
    }
    let deep = "[".repeat(100_000);
    assert!(Ask::parse(Endpoint::Chat, deep.as_bytes()).is_err());
}

/// A field that would change the answer must not be dropped silently; the same field with its neutral
/// value, and fields nobody knows, must pass.
#[test]
fn meaningful_fields_are_refused_and_neutral_ones_pass() {
    let refused = [
        json!({"n": 2}),
        json!({"tools": [{"type": "function"}]}),
        json!({"logprobs": true}),
        json!({"top_logprobs": 3}),
        json!({"response_format": {"type": "json_object"}}),
        json!({"logit_bias": {"50256": -100}}),
        json!({"frequency_penalty": 0.5}),
        json!({"messages": [{"role": "tool", "content": "x"}]}),
        json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    ];
    for extra in refused {
        assert_eq!(chat(&extra).unwrap_err().code, Some("unsupported_parameter"), "{extra}");
    }
    assert!(completion(&json!({"prompt": "x", "logprobs": 0})).is_err());
    assert!(completion(&json!({"prompt": "x", "echo": true})).is_err());
    let neutral = json!({
        "n": 1, "tools": [], "logprobs": false, "response_format": {"type": "text"}, "logit_bias": {},
        "frequency_penalty": 0.0, "presence_penalty": 0, "user": "u", "store": true, "invented": {"a": 1},
        "top_k": -1, "repetition_penalty": 1.0, "stop": null, "seed": null, "tool_choice": "none",
    });
    assert!(chat(&neutral).is_ok());
}

/// The newer name of the limit wins, and negative seeds are seeds.
#[test]
fn limits_and_seeds_are_read() {
    let ask = chat(&json!({"max_tokens": 5, "max_completion_tokens": 7, "seed": -1})).unwrap();
    assert_eq!((ask.tokens_max, ask.seed), (Some(7), Some(u64::MAX)));
    let ask = chat(&json!({"stream": true, "stream_options": {"include_usage": true}, "stop": "x"})).unwrap();
    assert_eq!((ask.delivery, ask.stops), (Delivery::StreamWithUsage, vec!["x".to_owned()]));
}
