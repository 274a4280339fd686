//! Bodies and events of answers, in OpenAI's shapes.

use serde_json::{Value, json};

use crate::request::Endpoint;

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it, or a stop text did.
    Stop,
    /// The limit of tokens or the context was reached.
    Length,
}

impl Finish {
    fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// Tokens of one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub completion_tokens: u64,
    /// Tokens of the prompt that were in the cache before the request.
    pub cached_tokens: u64,
}

impl Usage {
    fn body(self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        })
    }
}

/// What all bodies and events of one answer share.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Which shape.
    pub endpoint: Endpoint,
    /// Identity of the answer, without its prefix.
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// Name of the model.
    pub model: String,
    /// Whether a last event tells the usage; then all others have an empty one.
    pub with_usage: bool,
}

impl Frame {
    /// The body of an answer that is not streamed.
    pub fn whole(&self, text: &str, finish: Finish, usage: Usage) -> Value {
        let mut body = self.base("chat.completion");
        let choice = match self.endpoint {
            Endpoint::Chat => json!({
                "index": 0,
                "message": {"role": "assistant", "content": text, "refusal": null},
                "logprobs": null,
                "finish_reason": finish.name(),
            }),
            Endpoint::Completions => text_choice(text, Some(finish)),
        };
        body["choices"] = json!([choice]);
        body["usage"] = usage.body();
        body
    }

    /// The event that opens a chat; completions have none.
    pub fn opening(&self) -> Option<String> {
        match self.endpoint {
            Endpoint::Chat => Some(self.chunk(delta(json!({"role": "assistant", "content": ""}), None))),
            Endpoint::Completions => None,
        }
    }

    /// An event with some text.
    pub fn text(&self, text: &str) -> String {
        self.chunk(match self.endpoint {
            Endpoint::Chat => delta(json!({"content": text}), None),
            Endpoint::Completions => text_choice(text, None),
        })
    }

    /// The events that end an answer.
    pub fn ending(&self, finish: Finish, usage: Usage) -> String {
        let mut events = self.chunk(match self.endpoint {
            Endpoint::Chat => delta(json!({}), Some(finish)),
            Endpoint::Completions => text_choice("", Some(finish)),
        });
        if self.with_usage {
            let mut body = self.base("chat.completion.chunk");
            body["choices"] = json!([]);
            body["usage"] = usage.body();
            events.push_str(&event(&body));
        }
        events.push_str("data: [DONE]\n\n");
        events
    }

    fn chunk(&self, choice: Value) -> String {
        let mut body = self.base("chat.completion.chunk");
        body["choices"] = Value::Array(vec![choice]);
        if self.with_usage {
            body["usage"] = Value::Null;
        }
        event(&body)
    }

    fn base(&self, chat_object: &str) -> Value {
        let (prefix, object) = match self.endpoint {
            Endpoint::Chat => ("chatcmpl", chat_object),
            Endpoint::Completions => ("cmpl", "text_completion"),
        };
        json!({
            "id": format!("{prefix}-{}", self.id),
            "object": object,
            "created": self.created,
            "model": self.model,
        })
    }
}

/// One server-sent event. JSON has no raw line breaks, so one line is enough.
pub fn event(body: &Value) -> String {
    format!("data: {body}\n\n")
}

fn delta(delta: Value, finish: Option<Finish>) -> Value {
    json!({"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish.map(Finish::name)})
}

fn text_choice(text: &str, finish: Option<Finish>) -> Value {
    json!({"index": 0, "text": text, "logprobs": null, "finish_reason": finish.map(Finish::name)})
}

#[cfg(test)]
mod tests {
    use super::*;

    const USAGE: Usage = Usage { prompt_tokens: 10, completion_tokens: 3, cached_tokens: 8 };

    fn frame(endpoint: Endpoint, with_usage: bool) -> Frame {
        Frame { endpoint, id: "x".to_owned(), created: 7, model: "m".to_owned(), with_usage }
    }

    fn parsed(events: &str) -> Vec<Value> {
        let lines = events.split_terminator("\n\n").map(|event| event.strip_prefix("data: ").unwrap());
        lines
            .map(|line| if line == "[DONE]" { json!("done") } else { serde_json::from_str(line).unwrap() })
            .collect()
    }

    /// Clients read fixed paths; a whole answer must have them with the right sums.
    #[test]
    fn whole_answers_have_the_known_shape() {
        let body = frame(Endpoint::Chat, false).whole("hi", Finish::Stop, USAGE);
        assert_eq!(body["object"], "chat.completion");
        assert_eq!(body["choices"][0]["message"]["content"], "hi");
        assert_eq!(body["choices"][0]["finish_reason"], "stop");
        assert_eq!(body["usage"]["total_tokens"], 13);
        assert_eq!(body["usage"]["prompt_tokens_details"]["cached_tokens"], 8);
        let body = frame(Endpoint::Completions, false).whole("hi", Finish::Length, USAGE);
        assert_eq!((&body["choices"][0]["text"], &body["object"]), (&json!("hi"), &json!("text_completion")));
        assert_eq!(body["choices"][0]["finish_reason"], "length");
    }

    /// An event with a raw line break would be cut in two; text with breaks must stay in one.
    #[test]
    fn events_are_one_line_each() {
        let text = "a\n\ndata: x\r\n\u{2028}";
        let events = parsed(&frame(Endpoint::Chat, false).text(text));
        assert_eq!(events.len(), 1);
        assert_eq!(events[0]["choices"][0]["delta"]["content"], text);
        assert!(events[0].get("usage").is_none());
    }

    /// With include_usage every event has the field and the last one before the end has the numbers and no choice.
    #[test]
    fn usage_comes_last_when_asked_for() {
        for endpoint in [Endpoint::Chat, Endpoint::Completions] {
            let frame = frame(endpoint, true);
            assert!(parsed(&frame.text("x"))[0]["usage"].is_null());
            let events = parsed(&frame.ending(Finish::Stop, USAGE));
            assert_eq!(events.len(), 3);
            assert_eq!(events[0]["choices"][0]["finish_reason"], "stop");
            assert_eq!(events[1]["choices"], json!([]));
            assert_eq!(events[1]["usage"]["completion_tokens"], 3);
            assert_eq!(events[2], "done");
        }
    }
}
