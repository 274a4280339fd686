//! Why a prompt would go where it goes: every way to serve it, term by term.
//!
//! For operators on this machine. Nothing is started, counted or asked for in
//! advance: it is what the next request with this prompt would be placed by.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::StatusCode;
use serde_json::{Value, json};
use terrace_proto::v1::{SpaceManifest, WorkerLoad};

use crate::error::ApiError;
use crate::fleet::Worker;
use crate::http::{read_body, tokenize};
use crate::models::Model;
use crate::place::source::View;
use crate::place::{self, Considered};
use crate::request::{Ask, Endpoint};
use crate::serve::Router;

/// Most ways that are answered; the best ones come first.
const WAYS_MAX: usize = 256;

/// `POST /admin/explain`: the body is that of `/v1/completions`, or of
/// `/v1/chat/completions` if it holds `messages`.
///
/// # Errors
/// 403 to callers on other machines, and what the endpoint itself would answer.
pub async fn explain(State(router): State<Arc<Router>>, request: Request) -> Result<Json<Value>, ApiError> {
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>();
    if !peer.is_some_and(|ConnectInfo(address)| address.ip().is_loopback()) {
        let message = "placement is explained to callers on this machine only";
        return Err(ApiError::new(StatusCode::FORBIDDEN, message).code("loopback_only"));
    }
    let (parts, body) = request.into_parts();
    let body = read_body(&parts.headers, body, router.config.body_bytes_max).await?;
    let is_chat = serde_json::from_slice::<Value>(&body).is_ok_and(|body| body.get("messages").is_some());
    let ask = Ask::parse(if is_chat { Endpoint::Chat } else { Endpoint::Completions }, &body)?;
    let model = router.models.named(ask.model.as_deref())?;
    let tokens = tokenize(&model, ask.prompt).await?;
    Ok(Json(ways(&router, &model, &tokens).await))
}

async fn ways(router: &Router, model: &Arc<Model>, tokens: &[u32]) -> Value {
    let serves = |load: &WorkerLoad| router.models.of(load).is_some_and(|of| Arc::ptr_eq(&of, model));
    let view = router.fleet.view(Instant::now(), serves);
    let mut views: Vec<View> = Vec::new();
    for space in &view.spaces {
        views.extend(router.index.look_up(space, tokens, &router.metrics).await.views);
    }
    let daemons = router.index.daemons();
    let prefill = router.homes.candidates(&view.prefill, daemons);
    let decode = router.homes.candidates(&view.decode, daemons);
    let mut ways = place::explain(tokens.len() as u64, &views, &prefill, &decode);
    let count = ways.len();
    ways.truncate(WAYS_MAX);
    let best =
        ways.first().map(|way| (way.prefill.map_or(&decode[way.decode], |helper| &prefill[helper]), way));
    let fetches = best.map(|(worker, way)| views[worker.view].fetches(way.estimate.loaded_tokens));
    let fetches: Vec<Value> = fetches
        .into_iter()
        .flatten()
        .map(|fetch| {
            json!({
                "holder": fetch.holder,
                "tier": fetch.tier.name(),
                "begin_token": fetch.begin,
                "end_token": fetch.end,
                "seconds": fetch.seconds,
                "prefetch": fetch.is_prefetch(),
            })
        })
        .collect();
    json!({
        "model": model.id,
        "prompt_tokens": tokens.len(),
        "spaces": view.spaces.iter().map(space).collect::<Vec<_>>(),
        "busy_decode_workers": view.busy,
        "ways": ways.iter().map(|way| entry(way, &view.prefill, &view.decode)).collect::<Vec<_>>(),
        "ways_in_all": count,
        "fetches": fetches,
    })
}

fn space(space: &SpaceManifest) -> Value {
    json!({"model": space.model, "tokens_per_block": space.tokens_per_block})
}

fn entry(way: &Considered, prefill: &[Worker], decode: &[Worker]) -> Value {
    let estimate = way.estimate;
    let helper = way.prefill.map(|helper| &prefill[helper]);
    let computes = helper.unwrap_or(&decode[way.decode]);
    json!({
        "decode": decode[way.decode].load.name,
        "prefill": helper.map(|helper| helper.load.name.clone()),
        "space": computes.candidate.space,
        "full": way.is_full,
        "requests": way.requests,
        "queue_seconds": estimate.queue,
        "load_seconds": estimate.load,
        "prefill_seconds": estimate.prefill,
        "handover_seconds": estimate.handover,
        "harm_seconds": estimate.harm,
        "first_token_seconds": estimate.first_token(),
        "cost_seconds": estimate.cost(),
        "loaded_tokens": estimate.loaded_tokens,
        "cached_tokens": estimate.cached_tokens,
        "missing_tokens": estimate.missing_tokens,
        "linear_seconds_per_token": computes.candidate.prefill.linear,
        "quadratic_seconds_per_token_pair": computes.candidate.prefill.quadratic,
    })
}
