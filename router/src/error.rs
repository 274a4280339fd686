//! Errors in the shape that OpenAI's clients expect.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// Longest time after which a refused caller is told to come back.
const RETRY_SECONDS_MAX: u32 = 60;

/// A refusal or failure, ready to be shown to the caller.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// What is wrong and what to do, as a sentence.
    pub message: String,
    /// Field of the request that is to blame.
    pub param: Option<String>,
    /// Word for programs.
    pub code: Option<&'static str>,
    /// Seconds after which a retry makes sense.
    pub retry_after: Option<u32>,
}

impl ApiError {
    /// An error without details.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None, retry_after: None }
    }

    /// A value that cannot be used.
    pub fn bad(param: &str, message: impl Into<String>) -> Self {
        Self { param: Some(param.to_owned()), ..Self::new(StatusCode::BAD_REQUEST, message) }
    }

    /// A feature that would change the answer's meaning and does not exist here.
    pub fn unsupported(param: &str, message: impl Into<String>) -> Self {
        Self::bad(param, message).code("unsupported_parameter")
    }

    /// A prompt that leaves no room for an answer. Lengths are tokens.
    pub fn context(prompt_tokens: usize, context_tokens: usize, param: &str) -> Self {
        let message = format!(
            "this model's context is {context_tokens} tokens and the prompt has {prompt_tokens}; \
             shorten it to at most {} tokens",
            context_tokens.saturating_sub(1)
        );
        Self::bad(param, message).code("context_length_exceeded")
    }

    /// Too many requests at once.
    pub fn busy(message: impl Into<String>) -> Self {
        Self { retry_after: Some(1), ..Self::new(StatusCode::TOO_MANY_REQUESTS, message) }
            .code("rate_limit_exceeded")
    }

    /// The first token would come later than the caller waits for it. Times are seconds from the arrival.
    pub fn late(expected: f64, wanted: f64) -> Self {
        let message = format!(
            "the first token is expected after {expected:.1} s and was wanted within {wanted:.1} s; retry later"
        );
        Self::busy(message).retry_in(expected - wanted).code("deadline_exceeded")
    }

    /// Nobody is there to serve the request.
    pub fn no_worker(message: impl Into<String>) -> Self {
        Self { retry_after: Some(2), ..Self::new(StatusCode::SERVICE_UNAVAILABLE, message) }.code("no_worker")
    }

    /// The same error with a time after which a retry makes sense.
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to a range of whole numbers"
    )]
    pub fn retry_in(self, seconds: f64) -> Self {
        let seconds = seconds.ceil().clamp(1.0, f64::from(RETRY_SECONDS_MAX)) as u32;
        Self { retry_after: Some(seconds), ..self }
    }

    /// The same error with a word for programs.
    #[must_use]
    pub fn code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    /// OpenAI's class of the error.
    fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::BAD_GATEWAY | StatusCode::GATEWAY_TIMEOUT => {
                "service_unavailable_error"
            }
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// The body.
    pub fn body(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind(),
            "param": self.param,
            "code": self.code,
        }})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Clients branch on type, param and code: a renamed or missing field would break their handling.
    #[test]
    fn bodies_have_the_known_shape() {
        let error = ApiError::context(3000, 2048, "messages");
        let body = error.body();
        assert_eq!(body["error"]["type"], "invalid_request_error");
        assert_eq!(body["error"]["code"], "context_length_exceeded");
        assert_eq!(body["error"]["param"], "messages");
        let message = body["error"]["message"].as_str().unwrap();
        assert!(message.contains("3000") && message.contains("2048"), "{message}");
        let plain = ApiError::new(StatusCode::NOT_FOUND, "x").body();
        assert!(plain["error"]["param"].is_null() && plain["error"]["code"].is_null());
    }

    /// A client that is told to come back must be told when.
    #[test]
    fn busy_says_when_to_retry() {
        let response = ApiError::busy("full").into_response();
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(response.headers()[header::RETRY_AFTER], "1");
        assert_eq!(ApiError::busy("full").body()["error"]["type"], "rate_limit_error");
        let late = |expected| ApiError::late(expected, 1.0).retry_after;
        assert_eq!([late(1.2), late(3.5), late(f64::INFINITY)], [Some(1), Some(3), Some(60)]);
    }
}
