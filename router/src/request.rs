//! What a caller asks for: reads the bodies of the two generating endpoints.
//!
//! Unknown fields are ignored. A known field with a senseless value, or one
//! that would change the meaning of the answer and is not implemented, is
//! refused by name.

use std::ops::RangeInclusive;

use axum::http::StatusCode;
use serde_json::{Map, Value};
use terrace_worker::chat::Message;

use crate::admit::queue::Class;
use crate::error::ApiError;

/// Most stop texts, as OpenAI has it.
const STOPS_MAX: usize = 4;
/// Longest stop text in bytes.
const STOP_BYTES_MAX: usize = 1024;
/// Tokens of a completion that does not say how many it wants, as OpenAI has it.
const COMPLETION_TOKENS: u32 = 16;

/// Which endpoint was called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/completions`.
    Completions,
    /// `/v1/chat/completions`.
    Chat,
}

/// The prompt as it was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// Plain text.
    Text(String),
    /// Token ids.
    Tokens(Vec<u32>),
    /// A conversation.
    Messages(Vec<Message>),
}

impl Prompt {
    /// Field of the request that holds it.
    pub fn param(&self) -> &'static str {
        match self {
            Self::Text(_) | Self::Tokens(_) => "prompt",
            Self::Messages(_) => "messages",
        }
    }
}

/// How the answer comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// One JSON body.
    Whole,
    /// Server-sent events.
    Stream,
    /// Server-sent events, with the usage in a last one.
    StreamWithUsage,
}

/// A request that makes sense by itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Ask {
    /// Model name, if one was given.
    pub model: Option<String>,
    /// What to continue or answer.
    pub prompt: Prompt,
    /// How the answer comes.
    pub delivery: Delivery,
    /// Texts that end the answer.
    pub stops: Vec<String>,
    /// Most tokens to generate; `None` is as many as fit.
    pub tokens_max: Option<u32>,
    /// 0 is greedy, and the default: the same prompt then has the same answer, from
    /// the cache or not. A client that wants variety says so.
    pub temperature: f32,
    /// Nucleus, in (0, 1].
    pub top_p: f32,
    /// Seed of the sampler; `None` lets the router choose.
    pub seed: Option<u64>,
    /// Service class.
    pub class: Class,
    /// Lower goes first among the caller's own requests.
    pub priority: i32,
}

impl Ask {
    /// Reads a body.
    ///
    /// # Errors
    /// A 400 that names the field.
    pub fn parse(endpoint: Endpoint, body: &[u8]) -> Result<Self, ApiError> {
        let value: Value = serde_json::from_slice(body).map_err(|error| {
            let message = format!("the body is not valid JSON: {error}; send one JSON object");
            ApiError::new(StatusCode::BAD_REQUEST, message).code("invalid_json")
        })?;
        let Value::Object(map) = value else {
            let message = "the body must be one JSON object";
            return Err(ApiError::new(StatusCode::BAD_REQUEST, message).code("invalid_json"));
        };
        let fields = Fields(map);
        fields.refuse_unsupported(endpoint)?;
        let prompt = match endpoint {
            Endpoint::Completions => fields.prompt()?,
            Endpoint::Chat => Prompt::Messages(fields.messages()?),
        };
        Ok(Self {
            model: fields.text("model")?.map(str::to_owned),
            prompt,
            delivery: fields.delivery()?,
            stops: fields.stops()?,
            tokens_max: fields.tokens_max(endpoint)?,
            temperature: fields.number("temperature", 0.0..=2.0)?.unwrap_or(0.0),
            top_p: fields.top_p()?,
            seed: fields.seed()?,
            class: fields.class()?,
            priority: fields.priority()?,
        })
    }
}

/// The fields of a body. `null` counts as absent.
struct Fields(Map<String, Value>);

impl Fields {
    fn field(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    fn text(&self, name: &str) -> Result<Option<&str>, ApiError> {
        match self.field(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(ApiError::bad(name, format!("`{name}` must be a string"))),
        }
    }

    fn flag(&self, name: &str) -> Result<bool, ApiError> {
        match self.field(name) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(ApiError::bad(name, format!("`{name}` must be true or false"))),
        }
    }

    fn number(&self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.field(name) else { return Ok(None) };
        let number = value.as_f64().filter(|number| range.contains(number)).ok_or_else(|| {
            let message = format!("`{name}` must be a number from {} to {}", range.start(), range.end());
            ApiError::bad(name, message)
        })?;
        #[allow(clippy::cast_possible_truncation, reason = "rounds to the nearest f32 of a small range")]
        Ok(Some(number as f32))
    }

    fn count(&self, name: &str) -> Result<Option<u32>, ApiError> {
        let Some(value) = self.field(name) else { return Ok(None) };
        match value.as_u64() {
            Some(count) if count > 0 => Ok(Some(u32::try_from(count).unwrap_or(u32::MAX))),
            _ => Err(ApiError::bad(name, format!("`{name}` must be an integer of at least 1"))),
        }
    }

    fn top_p(&self) -> Result<f32, ApiError> {
        match self.number("top_p", 0.0..=1.0)? {
            Some(top_p) if top_p <= 0.0 => {
                Err(ApiError::bad("top_p", "`top_p` must be more than 0 and at most 1"))
            }
            top_p => Ok(top_p.unwrap_or(1.0)),
        }
    }

    fn seed(&self) -> Result<Option<u64>, ApiError> {
        let Some(value) = self.field("seed") else { return Ok(None) };
        let seed = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
        seed.map(Some).ok_or_else(|| ApiError::bad("seed", "`seed` must be an integer of 64 bits"))
    }

    fn class(&self) -> Result<Class, ApiError> {
        match self.text("service_tier")? {
            None | Some("auto" | "default") => Ok(Class::Default),
            Some("priority") => Ok(Class::Priority),
            Some("flex") => Ok(Class::Flex),
            Some(_) => {
                let message = "`service_tier` must be auto, default, priority or flex";
                Err(ApiError::bad("service_tier", message))
            }
        }
    }

    fn priority(&self) -> Result<i32, ApiError> {
        let Some(value) = self.field("priority") else { return Ok(0) };
        let priority = value.as_i64().and_then(|priority| i32::try_from(priority).ok());
        priority.ok_or_else(|| {
            ApiError::bad("priority", "`priority` must be an integer of 32 bits; lower goes first")
        })
    }

    fn tokens_max(&self, endpoint: Endpoint) -> Result<Option<u32>, ApiError> {
        let old = self.count("max_tokens")?;
        let count = match endpoint {
            Endpoint::Completions => old.or(Some(COMPLETION_TOKENS)),
            Endpoint::Chat => self.count("max_completion_tokens")?.or(old),
        };
        Ok(count)
    }

    fn delivery(&self) -> Result<Delivery, ApiError> {
        let stream = self.flag("stream")?;
        let usage = match self.field("stream_options") {
            None => false,
            Some(Value::Object(_)) if !stream => {
                return Err(ApiError::bad("stream_options", "`stream_options` needs `stream`: true"));
            }
            Some(Value::Object(options)) => Self(options.clone()).flag("include_usage")?,
            Some(_) => return Err(ApiError::bad("stream_options", "`stream_options` must be an object")),
        };
        Ok(match (stream, usage) {
            (false, _) => Delivery::Whole,
            (true, false) => Delivery::Stream,
            (true, true) => Delivery::StreamWithUsage,
        })
    }

    fn stops(&self) -> Result<Vec<String>, ApiError> {
        let message = format!("`stop` must be a string or a list of at most {STOPS_MAX} strings");
        let bad = || ApiError::bad("stop", message.clone());
        let stops = match self.field("stop") {
            None => Vec::new(),
            Some(Value::String(stop)) => vec![stop.clone()],
            Some(Value::Array(list)) if list.len() <= STOPS_MAX => {
                let texts = list.iter().map(|stop| stop.as_str().map(str::to_owned));
                texts.collect::<Option<Vec<_>>>().ok_or_else(bad)?
            }
            Some(_) => return Err(bad()),
        };
        if stops.iter().any(|stop| stop.is_empty() || stop.len() > STOP_BYTES_MAX) {
            let message = format!("each `stop` text must have 1 to {STOP_BYTES_MAX} bytes");
            return Err(ApiError::bad("stop", message));
        }
        Ok(stops)
    }

    fn prompt(&self) -> Result<Prompt, ApiError> {
        let bad = || {
            let message = "`prompt` must be a string, a list of one string, or a list of token ids";
            ApiError::bad("prompt", message)
        };
        let value = self.field("prompt").ok_or_else(|| ApiError::bad("prompt", "`prompt` is missing"))?;
        match value {
            Value::String(text) => Ok(Prompt::Text(text.clone())),
            Value::Array(list) => match list.as_slice() {
                [Value::String(text)] => Ok(Prompt::Text(text.clone())),
                [Value::Array(tokens)] => token_ids(tokens).ok_or_else(bad),
                [Value::String(_) | Value::Array(_), ..] => Err(ApiError::unsupported(
                    "prompt",
                    format!("`prompt` holds {} prompts; send one a request", list.len()),
                )),
                tokens => token_ids(tokens).ok_or_else(bad),
            },
            _ => Err(bad()),
        }
    }

    fn messages(&self) -> Result<Vec<Message>, ApiError> {
        let list = match self.field("messages") {
            None => return Err(ApiError::bad("messages", "`messages` is missing")),
            Some(Value::Array(list)) if !list.is_empty() => list,
            Some(_) => {
                return Err(ApiError::bad("messages", "`messages` must be a list of at least one message"));
            }
        };
        list.iter().enumerate().map(|(index, value)| message(index, value)).collect()
    }

    fn refuse_unsupported(&self, endpoint: Endpoint) -> Result<(), ApiError> {
        // A chat's `logprobs` is a flag; a completion's 0 asks for the chosen token's.
        let no_logprobs = match endpoint {
            Endpoint::Chat => is_false,
            Endpoint::Completions => never,
        };
        let logprobs: Rule = ("logprobs", no_logprobs, "no log probabilities; leave it out");
        for (name, harmless, advice) in RULES.into_iter().chain([logprobs]) {
            if self.field(name).is_some_and(|value| !harmless(value)) {
                return Err(ApiError::unsupported(name, format!("`{name}` is not supported: {advice}")));
            }
        }
        Ok(())
    }
}

/// A field, whether what it says leaves the answer as it is, and what to do
/// otherwise.
type Rule = (&'static str, fn(&Value) -> bool, &'static str);

/// Fields that would change the meaning of an answer and are not implemented.
const RULES: [Rule; 23] = [
    ("n", is_one, "one answer a request; leave it out or send 1"),
    ("best_of", is_one, "one answer a request; leave it out or send 1"),
    ("tools", is_empty, "no tools; leave it out"),
    ("tool_choice", is_none_or_auto, "no tools; leave it out"),
    ("functions", is_empty, "no functions; leave it out"),
    ("function_call", is_none_or_auto, "no functions; leave it out"),
    ("top_logprobs", is_zero, "no log probabilities; leave it out"),
    ("response_format", is_text_only, "plain text only; leave it out"),
    ("modalities", is_text_only, "text only; leave it out"),
    ("audio", is_empty, "text only; leave it out"),
    ("logit_bias", is_empty, "no bias; leave it out"),
    ("frequency_penalty", is_zero, "no penalties; leave it out or send 0"),
    ("presence_penalty", is_zero, "no penalties; leave it out or send 0"),
    ("repetition_penalty", is_one, "no penalties; leave it out or send 1"),
    ("top_k", is_unlimited, "no top_k; use top_p"),
    ("min_p", is_zero, "no min_p; use top_p"),
    ("echo", is_false, "no echo; put the prompt in front yourself"),
    ("suffix", is_empty, "no insertion; leave it out"),
    ("ignore_eos", is_false, "answers end at the model's end token; leave it out"),
    ("min_tokens", is_zero, "no minimum length; leave it out"),
    ("use_beam_search", is_false, "no beam search; leave it out"),
    ("guided_json", is_empty, "no guided decoding; leave it out"),
    ("prompt_logprobs", is_zero, "no log probabilities; leave it out"),
];

fn never(_: &Value) -> bool {
    false
}

fn is_one(value: &Value) -> bool {
    value.as_f64() == Some(1.0)
}

fn is_zero(value: &Value) -> bool {
    value.as_f64() == Some(0.0)
}

fn is_false(value: &Value) -> bool {
    value.as_bool() == Some(false)
}

fn is_unlimited(value: &Value) -> bool {
    matches!(value.as_i64(), Some(-1 | 0))
}

fn is_none_or_auto(value: &Value) -> bool {
    matches!(value.as_str(), Some("none" | "auto"))
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

fn is_text_only(value: &Value) -> bool {
    match value {
        Value::Object(format) => format.get("type").and_then(Value::as_str) == Some("text"),
        Value::Array(list) => list.iter().all(|word| word.as_str() == Some("text")),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    }
}

fn token_ids(list: &[Value]) -> Option<Prompt> {
    let ids = list.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()));
    ids.collect::<Option<Vec<_>>>().map(Prompt::Tokens)
}

/// One message. Its content is a string or a list of text parts.
fn message(index: usize, value: &Value) -> Result<Message, ApiError> {
    let at = |field: &str| format!("messages[{index}].{field}");
    let role = value.get("role").and_then(Value::as_str);
    let role = role.ok_or_else(|| ApiError::bad(&at("role"), "each message needs a `role`"))?;
    let role = match role {
        "system" | "user" | "assistant" => role,
        // The newer name of the same thing.
        "developer" => "system",
        other => {
            let message = format!("role `{other}` is not supported; use system, user or assistant");
            return Err(ApiError::unsupported(&at("role"), message));
        }
    };
    if value.get("tool_calls").is_some_and(|calls| !calls.is_null()) {
        return Err(ApiError::unsupported(&at("tool_calls"), "tools are not supported"));
    }
    let param = at("content");
    let content = match value.get("content") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => {
            let text = |part: &Value| match part.get("type").and_then(Value::as_str) {
                Some("text") => part.get("text").and_then(Value::as_str).map(str::to_owned),
                _ => None,
            };
            let texts: Option<Vec<String>> = parts.iter().map(text).collect();
            let message = "content parts must be of type `text`; images, audio and files are not supported";
            texts.ok_or_else(|| ApiError::unsupported(&param, message))?.concat()
        }
        _ => {
            let message = "each message needs a `content`: a string or a list of text parts";
            return Err(ApiError::bad(&param, message));
        }
    };
    Ok(Message { role: role.to_owned(), content })
}

#[cfg(test)]
mod tests;
