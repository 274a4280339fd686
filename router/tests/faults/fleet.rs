//! A router on a real port before workers that fail on demand. The workers speak
//! the real gRPC service and tokenizer; only the model is replaced by a text, so
//! that a test can say what must come out.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use clap::Parser;
use futures_util::Stream;
use serde_json::Value;
use terrace_proto::v1;
use terrace_proto::v1::generate_response::Part;
use terrace_proto::v1::worker_service_server::{WorkerService, WorkerServiceServer};
use terrace_router::config::Options;
use terrace_router::http::routes;
use terrace_router::serve::Router;
use terrace_worker::tiny::TinyModel;
use terrace_worker::tokenizer::Tokenizer;
use tokio::sync::Notify;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// What the model "says": letters, a split character, and a stop text.
pub(crate) const ANSWER: &str = "the quick brown fox \u{e9}\u{1f600} jumps END over";

/// What a worker does with its next call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// Answers to the end.
    Answer,
    /// Breaks after this many tokens, with an error.
    Break(usize),
    /// Ends the stream after this many tokens without a last word.
    EndEarly(usize),
    /// Refuses the prompt.
    Refuse,
    /// Says that it is full.
    Full,
    /// Sends this many tokens, then nothing more.
    Hang(usize),
    /// Gives the request back after this many tokens, as it drains.
    Leave(usize),
}

/// A worker that plays a list of acts, then answers for ever.
#[derive(Clone)]
pub(crate) struct TestWorker {
    tokens: Arc<Vec<u32>>,
    acts: Arc<Mutex<VecDeque<Act>>>,
    /// Calls so far.
    pub(crate) calls: Arc<AtomicUsize>,
    /// Told whenever a stream is dropped, finished or not.
    pub(crate) dropped: Arc<Notify>,
    /// Prompts of the calls.
    pub(crate) prompts: Arc<Mutex<Vec<v1::GenerateRequest>>>,
}

type Tokens = Pin<Box<dyn Stream<Item = Result<v1::GenerateResponse, Status>> + Send>>;

struct TellsDrop(Arc<Notify>);

impl Drop for TellsDrop {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

impl TestWorker {
    /// Plays this next.
    pub(crate) fn plays(&self, act: Act) {
        self.acts.lock().unwrap().push_front(act);
    }

    /// Whether it would still do anything but answer.
    pub(crate) fn has_acts(&self) -> bool {
        !self.acts.lock().unwrap().is_empty()
    }

    fn next_act(&self) -> Act {
        self.calls.fetch_add(1, Ordering::SeqCst);
        self.acts.lock().unwrap().pop_front().unwrap_or(Act::Answer)
    }
}

/// How many tokens of the answer a prompt ends with.
fn said(answer: &[u32], prompt: &[u32]) -> usize {
    (0..=answer.len()).rev().find(|count| prompt.ends_with(&answer[..*count])).unwrap_or(0)
}

#[tonic::async_trait]
impl WorkerService for TestWorker {
    type GenerateStream = Tokens;

    async fn prefill(
        &self,
        request: Request<v1::PrefillRequest>,
    ) -> Result<Response<v1::PrefillResponse>, Status> {
        let count = u32::try_from(request.into_inner().tokens.len()).unwrap();
        match self.next_act() {
            Act::Answer => Ok(Response::new(v1::PrefillResponse {
                cached_tokens: 16,
                computed_tokens: count - 16,
                queue_us: 0,
                prefill_us: 1,
            })),
            Act::Full => Err(Status::resource_exhausted("full")),
            Act::Refuse => Err(Status::invalid_argument("this prompt is refused")),
            Act::Hang(_) => std::future::pending().await,
            Act::Break(_) | Act::EndEarly(_) => Err(Status::unavailable("broken")),
            Act::Leave(_) => Err(Status::aborted("draining")),
        }
    }

    async fn drain(&self, _: Request<v1::DrainRequest>) -> Result<Response<v1::DrainResponse>, Status> {
        Ok(Response::new(v1::DrainResponse::default()))
    }

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let request = request.into_inner();
        let act = self.next_act();
        self.prompts.lock().unwrap().push(request.clone());
        let end = match act {
            Act::Full => return Err(Status::resource_exhausted("full")),
            Act::Refuse => return Err(Status::invalid_argument("this prompt is refused")),
            Act::Answer => None,
            Act::Break(count) | Act::EndEarly(count) | Act::Hang(count) | Act::Leave(count) => Some(count),
        };
        let done = said(&self.tokens, &request.tokens);
        let room = usize::try_from(request.tokens_max).unwrap();
        let rest = self.tokens[done..].iter().copied().take(end.unwrap_or(usize::MAX)).take(room);
        let is_cut = room < self.tokens.len() - done;
        let mut parts: Vec<Result<Part, Status>> =
            vec![Ok(Part::Started(v1::GenerateStarted { cached_tokens: 3, ..Default::default() }))];
        parts.extend(rest.map(|token| Ok(Part::Token(token))));
        match act {
            Act::Break(_) => parts.push(Err(Status::unavailable("broken"))),
            Act::Leave(_) => parts.push(Err(Status::aborted("draining"))),
            Act::Answer => {
                let reason = if is_cut { v1::FinishReason::Length } else { v1::FinishReason::Stop };
                parts.push(Ok(Part::Finished(v1::GenerateFinished { reason: reason.into(), tokens: 0 })));
            }
            Act::EndEarly(_) | Act::Hang(_) | Act::Refuse | Act::Full => {}
        }
        let hangs = matches!(act, Act::Hang(_));
        let tells = TellsDrop(Arc::clone(&self.dropped));
        let state = (parts.into_iter(), tells, hangs);
        let stream = futures_util::stream::unfold(state, async |(mut parts, tells, hangs)| {
            let Some(part) = parts.next() else {
                if hangs {
                    std::future::pending::<()>().await;
                }
                return None;
            };
            let message = part.map(|part| v1::GenerateResponse { part: Some(part) });
            Some((message, (parts, tells, hangs)))
        });
        Ok(Response::new(Box::pin(stream)))
    }
}

/// A router, its workers and the model file.
pub(crate) struct Fleet {
    /// Of the API.
    pub(crate) url: String,
    /// The router's insides.
    pub(crate) router: Arc<Router>,
    /// Workers, in the order of their acts.
    pub(crate) workers: Vec<TestWorker>,
    /// The model's tokenizer.
    pub(crate) tokenizer: Arc<Tokenizer>,
    reports: v1::ObserveResponse,
    _home: tempfile::TempDir,
}

/// Role and acts of one worker.
pub(crate) type Script<'a> = (v1::WorkerRole, &'a [Act]);

impl Fleet {
    /// Starts workers and a router. Nobody runs a daemon: reports are handed in.
    pub(crate) async fn start(scripts: &[Script<'_>], options: &[&str]) -> Self {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("tiny-test.gguf");
        TinyModel::default().write(&path).unwrap();
        let tokenizer = Arc::new(Tokenizer::open(&path).unwrap());
        let answer = Arc::new(tokenizer.encode(ANSWER).unwrap());
        let mut loads = Vec::new();
        let mut workers = Vec::new();
        for (index, (role, acts)) in scripts.iter().enumerate() {
            let worker = TestWorker {
                tokens: Arc::clone(&answer),
                acts: Arc::new(Mutex::new(acts.iter().copied().collect())),
                calls: Arc::default(),
                dropped: Arc::default(),
                prompts: Arc::default(),
            };
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            loads.push(v1::WorkerLoad {
                name: format!("worker-{index}"),
                role: (*role).into(),
                endpoint: format!("http://{}", listener.local_addr().unwrap()),
                pid: u32::try_from(index).unwrap(),
                space: Some(v1::SpaceManifest {
                    model: "tiny".to_owned(),
                    tokens_per_block: 16,
                    ..Default::default()
                }),
                requests_max: 2,
                prefill_tokens_per_second: 1000.0,
                context_tokens_max: 512,
                model_path: path.to_string_lossy().into_owned(),
                ..Default::default()
            });
            let server =
                tonic::transport::Server::builder().add_service(WorkerServiceServer::new(worker.clone()));
            tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
            workers.push(worker);
        }
        // Port 1 belongs to nobody: the router must serve without its daemon.
        let line = ["terrace-router", "--grpc", "http://127.0.0.1:1"];
        let options = Options::parse_from(line.into_iter().chain(options.iter().copied()));
        let router = Arc::new(Router::new(options.check().unwrap()).unwrap());
        router.models.read(&loads);
        let reports = v1::ObserveResponse { incarnation: 1, workers: loads, pressures: Vec::new() };
        router.fleet.observe(&reports, Instant::now());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let app = routes(Arc::clone(&router)).into_make_service_with_connect_info::<SocketAddr>();
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { url, router, workers, tokenizer, reports, _home: home }
    }
}

impl Fleet {
    /// Reports all workers as new processes, of which the router knows nothing bad.
    pub(crate) fn renew(&mut self) {
        self.reports.workers.iter_mut().for_each(|load| load.pid += 100);
        self.router.fleet.observe(&self.reports, Instant::now());
    }

    /// Sends a body; returns status, headers and text.
    pub(crate) async fn post(&self, route: &str, body: String) -> (u16, reqwest::header::HeaderMap, String) {
        let response = self.send(route, body).await;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        (status, headers, response.text().await.unwrap())
    }

    /// Sends a body; returns the response with its body still to come.
    pub(crate) async fn send(&self, route: &str, body: String) -> reqwest::Response {
        let client = reqwest::Client::builder().no_proxy().timeout(DEADLINE).build().unwrap();
        client.post(format!("{}{route}", self.url)).body(body).send().await.unwrap()
    }

    /// Asks for the answer to a fixed prompt; returns status and body.
    pub(crate) async fn ask(&self, extra: &Value) -> (u16, Value) {
        let (status, _, text) = self.post("/v1/completions", question(extra)).await;
        (status, serde_json::from_str(&text).unwrap())
    }
}

/// Everything here answers within this time or never.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// A short prompt with more fields.
pub(crate) fn question(extra: &Value) -> String {
    let mut body = serde_json::json!({"prompt": "say it?", "max_tokens": 100, "temperature": 0});
    for (name, value) in extra.as_object().unwrap() {
        body[name] = value.clone();
    }
    body.to_string()
}

/// Waits until something becomes true; polls, as the other side is another task.
pub(crate) async fn until(what: &str, mut is_true: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !is_true() {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
