//! The routes of the API, and what a request passes on its way in and out.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router as Routes};
use futures_util::StreamExt;
use serde_json::{Value, json};
use terrace_proto::v1::{WorkerLoad, WorkerRole};
use tokio::sync::mpsc;

use crate::admit::Caller;
use crate::doors;
use crate::error::ApiError;
use crate::explain;
use crate::generate::{self, Event, Job};
use crate::models::{Model, unix_seconds};
use crate::publish::Publisher;
use crate::random;
use crate::request::{Ask, Delivery, Endpoint, Prompt};
use crate::response::{self, Frame};
use crate::serve::Router;

/// A request's own time in which its first token is wanted, in milliseconds.
const FIRST_TOKEN_MS: HeaderName = HeaderName::from_static("x-first-token-ms");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest id that is taken over from a caller.
const REQUEST_ID_BYTES_MAX: usize = 128;
/// Longest time that a body may take to come.
const BODY_WITHIN: Duration = Duration::from_secs(30);
/// How long the rest of a refused body is read for, so that its sender gets to
/// read the answer instead of a broken connection.
const DRAIN_TIME: Duration = Duration::from_secs(2);
/// How much of a refused body is read, as a multiple of the limit.
const DRAIN_FACTOR: usize = 16;
/// Time between two signs of life while a stream waits.
const SIGN_OF_LIFE: Duration = Duration::from_secs(15);

/// Id of a request, for logs, workers and the caller.
#[derive(Clone, Debug)]
struct RequestId(String);

/// All routes of a router.
pub fn routes(router: Arc<Router>) -> Routes {
    Routes::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*model}", get(one_model))
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat))
        .route("/admin/explain", post(explain::explain))
        .route("/admin/hot", get(doors::hot))
        .route("/admin/prefix", post(doors::prefix))
        .route("/events/dynamo", post(doors::dynamo_events))
        .route("/events/dynamo/{worker}", delete(doors::dynamo_gone))
        .route("/dump", get(doors::dump))
        .route("/check_blocks", post(doors::check_blocks))
        .route("/metrics", get(metrics))
        .route("/healthz", get(health))
        .method_not_allowed_fallback(wrong_method)
        .fallback(unknown_route)
        .layer(middleware::from_fn_with_state(Arc::clone(&router), around))
        .with_state(router)
}

/// Gives each request an id and counts its answer.
async fn around(State(router): State<Arc<Router>>, mut request: Request, next: Next) -> Response {
    let given = request.headers().get(&REQUEST_ID).and_then(|id| id.to_str().ok());
    let given = given.filter(|id| !id.is_empty() && id.len() <= REQUEST_ID_BYTES_MAX);
    let id = given.map_or_else(new_id, str::to_owned);
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    request.extensions_mut().insert(RequestId(id.clone()));
    let mut response = next.run(request).await;
    if let Ok(value) = HeaderValue::try_from(id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    router.metrics.answered(route.as_deref().unwrap_or("unknown"), response.status().as_u16());
    response
}

/// Hard to guess and never the same twice in one process.
fn new_id() -> String {
    format!("{:016x}", random::bits())
}

async fn unknown_route(method: Method, uri: Uri) -> ApiError {
    let message = format!(
        "there is no {method} {}; see /v1/models, /v1/completions and /v1/chat/completions",
        uri.path()
    );
    ApiError::new(StatusCode::NOT_FOUND, message).code("unknown_url")
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    let message = format!("{} does not take {method}; see the Allow header", uri.path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message).code("method_not_allowed")
}

async fn models(State(router): State<Arc<Router>>) -> Json<Value> {
    let list: Vec<Value> = router.models.all().iter().map(|model| model_body(model)).collect();
    Json(json!({"object": "list", "data": list}))
}

async fn one_model(
    State(router): State<Arc<Router>>,
    axum::extract::Path(name): axum::extract::Path<String>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(model_body(&*router.models.named(Some(&name))?)))
}

fn model_body(model: &Model) -> Value {
    json!({"id": model.id, "object": "model", "created": model.created, "owned_by": "terrace"})
}

async fn metrics(State(router): State<Arc<Router>>) -> Result<Response, ApiError> {
    let loads = router.fleet.loads();
    let count = |role| loads.iter().filter(|load| load.role() == role).count();
    let text = router.metrics.text(count(WorkerRole::Prefill), count(WorkerRole::Decode));
    let published = router.publisher.get().map(Publisher::text).transpose();
    let text = text.and_then(|text| Ok(text + &router.index.text()? + &published?.unwrap_or_default()));
    let text = text.map_err(|error| ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response())
}

/// Healthy is: a request would find a decode worker.
async fn health(State(router): State<Arc<Router>>) -> Response {
    let serves = |load: &WorkerLoad| load.role() == WorkerRole::Decode && router.models.of(load).is_some();
    let count = router.fleet.loads().into_iter().filter(serves).count();
    if count == 0 {
        return (StatusCode::SERVICE_UNAVAILABLE, "no decode worker has reported yet\n").into_response();
    }
    format!("ok: {count} decode workers\n").into_response()
}

async fn completions(State(router): State<Arc<Router>>, request: Request) -> Result<Response, ApiError> {
    serve(router, Endpoint::Completions, request).await
}

async fn chat(State(router): State<Arc<Router>>, request: Request) -> Result<Response, ApiError> {
    serve(router, Endpoint::Chat, request).await
}

async fn serve(router: Arc<Router>, endpoint: Endpoint, request: Request) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let id = request.extensions().get::<RequestId>().map_or_else(new_id, |id| id.0.clone());
    let (parts, body) = request.into_parts();
    let first_token_by = first_token_by(&parts.headers)?.or(router.config.first_token_by);
    let mut caller = router.config.callers.caller(&parts.headers);
    let place = router.admit(&caller)?;
    let body = read_body(&parts.headers, body, router.config.body_bytes_max).await?;
    let ask = Ask::parse(endpoint, &body)?;
    drop(body);
    (caller.class, caller.priority) = (ask.class, ask.priority);
    let model = router.models.named(ask.model.as_deref())?;
    let frame = Frame {
        endpoint,
        id: id.clone(),
        created: unix_seconds(),
        model: model.id.clone(),
        with_usage: ask.delivery == Delivery::StreamWithUsage,
    };
    let delivery = ask.delivery;
    let job = Job { first_token_by, ..prepare(&router, model, caller, ask, id, arrived).await? };
    let events = generate::start(router, job, place);
    match delivery {
        Delivery::Whole => whole(&frame, events).await,
        Delivery::Stream | Delivery::StreamWithUsage => stream(frame, events).await,
    }
}

/// How soon the caller wants the first token, if it says so.
fn first_token_by(headers: &HeaderMap) -> Result<Option<Duration>, ApiError> {
    let Some(value) = headers.get(&FIRST_TOKEN_MS) else { return Ok(None) };
    let milliseconds = value.to_str().ok().and_then(|text| text.parse::<u32>().ok()).filter(|&ms| ms > 0);
    let message = "`x-first-token-ms` must be a whole number of milliseconds, more than 0";
    let milliseconds = milliseconds.ok_or_else(|| ApiError::bad("x-first-token-ms", message))?;
    Ok(Some(Duration::from_millis(milliseconds.into())))
}

/// Turns the prompt into tokens and fits the answer into the context.
async fn prepare(
    router: &Arc<Router>,
    model: Arc<Model>,
    caller: Caller,
    ask: Ask,
    id: String,
    arrived: Instant,
) -> Result<Job, ApiError> {
    let Ask { prompt, stops, tokens_max, temperature, top_p, seed, .. } = ask;
    let param = prompt.param();
    let tokens = tokenize(&model, prompt).await?;
    let context = context(router, &model);
    // An answer needs room for one token at least.
    if tokens.len() >= context {
        return Err(ApiError::context(tokens.len(), context, param));
    }
    let room = u32::try_from(context - tokens.len()).unwrap_or(u32::MAX);
    Ok(Job {
        caller,
        id,
        model,
        tokens,
        stops,
        tokens_max: tokens_max.unwrap_or(room).min(room),
        temperature,
        top_p,
        seed: seed.unwrap_or_else(random::bits),
        arrived,
        first_token_by: None,
    })
}

/// Tokenizes beside the other requests: a long text takes a while.
pub(crate) async fn tokenize(model: &Arc<Model>, prompt: Prompt) -> Result<Vec<u32>, ApiError> {
    let model = Arc::clone(model);
    let tokens = tokio::task::spawn_blocking(move || model.tokens(&prompt)).await;
    tokens.map_err(|error| {
        tracing::error!(%error, "the tokenizer panicked");
        ApiError::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the tokenizer failed on this prompt; please report it",
        )
    })?
}

/// Longest context that the model and any worker of it can serve, in tokens.
fn context(router: &Router, model: &Arc<Model>) -> usize {
    let loads = router.fleet.loads();
    let served = loads.iter().filter(|load| router.models.of(load).is_some_and(|of| Arc::ptr_eq(&of, model)));
    let workers = served.filter(|load| load.role() == WorkerRole::Decode);
    let longest = workers.map(|load| load.context_tokens_max as usize).max();
    let known = [longest.unwrap_or(0), model.tokenizer.context()];
    known.into_iter().filter(|tokens| *tokens > 0).min().unwrap_or(usize::MAX)
}

/// Reads a body up to a limit. One that does not come is given up: the request has a place meanwhile.
pub(crate) async fn read_body(headers: &HeaderMap, body: Body, limit: usize) -> Result<Bytes, ApiError> {
    read_body_within(headers, body, limit, BODY_WITHIN).await
}

async fn read_body_within(
    headers: &HeaderMap,
    body: Body,
    limit: usize,
    within: Duration,
) -> Result<Bytes, ApiError> {
    tokio::time::timeout(within, read_to_the_end(headers, body, limit)).await.unwrap_or_else(|_| {
        let message = format!("the body did not come within {} s; send all of it at once", within.as_secs());
        Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message).code("body_too_slow"))
    })
}

async fn read_to_the_end(headers: &HeaderMap, body: Body, limit: usize) -> Result<Bytes, ApiError> {
    let too_large = || {
        let message = format!("the body is larger than {limit} bytes, which is the limit; send less");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message).code("body_too_large")
    };
    let length =
        headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    let mut stream = body.into_data_stream();
    if length.is_some_and(|length| length > limit as u64) {
        drain(&mut stream, limit.saturating_mul(DRAIN_FACTOR)).await;
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    while let Some(piece) = stream.next().await {
        let piece = piece.map_err(|error| {
            ApiError::new(StatusCode::BAD_REQUEST, format!("the body could not be read: {error}"))
        })?;
        if bytes.len() + piece.len() > limit {
            drain(&mut stream, limit.saturating_mul(DRAIN_FACTOR)).await;
            return Err(too_large());
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes.into())
}

async fn drain(stream: &mut axum::body::BodyDataStream, limit: usize) {
    let read = async {
        let mut bytes = 0usize;
        while let Some(Ok(piece)) = stream.next().await {
            bytes = bytes.saturating_add(piece.len());
            if bytes > limit {
                return;
            }
        }
    };
    // Whether all of it came does not matter: it is thrown away.
    let _ = tokio::time::timeout(DRAIN_TIME, read).await;
}

async fn whole(frame: &Frame, mut events: mpsc::Receiver<Event>) -> Result<Response, ApiError> {
    let mut text = String::new();
    while let Some(event) = events.recv().await {
        match event {
            Event::Started => {}
            Event::Text(piece) => text.push_str(&piece),
            Event::Finished(finish, usage) => {
                return Ok(Json(frame.whole(&text, finish, usage)).into_response());
            }
            Event::Failed(error) => return Err(error),
        }
    }
    Err(broken_off())
}

async fn stream(frame: Frame, mut events: mpsc::Receiver<Event>) -> Result<Response, ApiError> {
    // Until something is known to work, a failure can still have its own status.
    let first = match events.recv().await {
        None => return Err(broken_off()),
        Some(Event::Failed(error)) => return Err(error),
        Some(event) => event,
    };
    let opening = frame.opening().unwrap_or_default() + &written(&frame, first).0;
    let state = Some((frame, events));
    let rest = futures_util::stream::unfold(state, async |state| {
        let (frame, mut events) = state?;
        let event = match tokio::time::timeout(SIGN_OF_LIFE, events.recv()).await {
            // A comment: keeps proxies from closing a quiet connection.
            Err(_) => return Some((": waiting\n\n".to_owned(), Some((frame, events)))),
            Ok(event) => event.unwrap_or_else(|| Event::Failed(broken_off())),
        };
        let (text, is_last) = written(&frame, event);
        Some((text, if is_last { None } else { Some((frame, events)) }))
    });
    let text = futures_util::stream::once(async { opening }).chain(rest);
    let body = Body::from_stream(text.map(Ok::<_, std::convert::Infallible>));
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-cache"),
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    Ok((headers, body).into_response())
}

/// An event as a client reads it, and whether it is the last one.
fn written(frame: &Frame, event: Event) -> (String, bool) {
    match event {
        Event::Started => (String::new(), false),
        Event::Text(text) => (frame.text(&text), false),
        Event::Finished(finish, usage) => (frame.ending(finish, usage), true),
        Event::Failed(error) => (response::event(&error.body()), true),
    }
}

fn broken_off() -> ApiError {
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "the router broke off this answer; see its log")
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    /// Clients that sent half a body held places for ever, until nobody else was served.
    #[tokio::test]
    async fn a_body_that_does_not_come_is_given_up() {
        let half = futures_util::stream::once(async { Ok::<_, Infallible>("{\"messages\"") });
        let body = Body::from_stream(half.chain(futures_util::stream::pending()));
        let read = read_body_within(&HeaderMap::new(), body, 1000, Duration::from_millis(20)).await;
        let error = read.unwrap_err();
        assert_eq!((error.status, error.code), (StatusCode::REQUEST_TIMEOUT, Some("body_too_slow")));
    }
}
