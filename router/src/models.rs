//! The models that can be asked for: their names, tokenizers and chat templates.
//!
//! Workers report the file that they serve; the router reads its header. With
//! `--model` the header of that file serves for workers of the same model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use axum::http::StatusCode;
use terrace_proto::v1::WorkerLoad;
use terrace_worker::tokenizer::{Tokenizer, TokenizerError};

use crate::error::ApiError;
use crate::request::Prompt;

/// Most models kept.
const MODELS_MAX: usize = 16;
/// Time between two attempts to read a file.
const RETRY: Duration = Duration::from_secs(5);

/// One model.
pub struct Model {
    /// Name that the API shows.
    pub id: String,
    /// Other names by which it may be asked for.
    aliases: Vec<String>,
    /// Its tokenizer and chat template.
    pub tokenizer: Tokenizer,
    /// When it was loaded, in seconds since 1970.
    pub created: u64,
}

impl Model {
    fn open(path: &Path, name: Option<&str>) -> Result<Self, TokenizerError> {
        let tokenizer = Tokenizer::open(path)?;
        let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
        let id = name.map(str::to_owned).or_else(|| stem.clone());
        let id = id.unwrap_or_else(|| tokenizer.model().to_owned());
        let file = path.file_name().map(|file| file.to_string_lossy().into_owned());
        let aliases = [stem, file, Some(tokenizer.model().to_owned())].into_iter().flatten().collect();
        Ok(Self { id, aliases, tokenizer, created: unix_seconds() })
    }

    fn answers_to(&self, name: &str) -> bool {
        self.id == name || self.aliases.iter().any(|alias| alias == name)
    }

    /// Token ids of a prompt.
    ///
    /// # Errors
    /// A 400 if the prompt is empty, names unknown ids, or is refused by the
    /// chat template.
    pub fn tokens(&self, prompt: &Prompt) -> Result<Vec<u32>, ApiError> {
        let param = prompt.param();
        let bad = |message: String| ApiError::bad(param, message);
        let tokens = match prompt {
            Prompt::Text(text) => self.tokenizer.encode(text).map_err(|error| bad(error.to_string()))?,
            Prompt::Tokens(tokens) => {
                let count = self.tokenizer.vocabulary();
                if let Some(token) = tokens.iter().find(|token| **token as usize >= count) {
                    return Err(bad(format!(
                        "token id {token} is out of range; the model has {count} tokens"
                    )));
                }
                tokens.clone()
            }
            Prompt::Messages(messages) => {
                let chat = self.tokenizer.chat().ok_or_else(|| {
                    bad(format!("model `{}` has no chat template; use /v1/completions", self.id))
                })?;
                let text = chat.render(messages).map_err(|error| bad(error.to_string()))?;
                self.tokenizer.encode_chat(&text).map_err(|error| bad(error.to_string()))?
            }
        };
        if tokens.is_empty() {
            return Err(bad("the prompt is empty; send at least one token".to_owned()));
        }
        Ok(tokens)
    }
}

/// Seconds since 1970.
pub fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// All models, by the file that they came from.
pub struct Models {
    name: Option<String>,
    fixed: Option<Arc<Model>>,
    read: Mutex<BTreeMap<PathBuf, Attempt>>,
}

enum Attempt {
    Loaded(Arc<Model>),
    Failed(Instant),
}

impl Models {
    /// Reads the fixed file, if there is one.
    ///
    /// # Errors
    /// If it cannot be used.
    pub fn open(fixed: Option<&Path>, name: Option<String>) -> Result<Self, TokenizerError> {
        let fixed = fixed.map(|path| Model::open(path, name.as_deref())).transpose()?.map(Arc::new);
        Ok(Self { name, fixed, read: Mutex::default() })
    }

    /// Reads the files that these workers serve, unless they are known. Blocks
    /// on the file system.
    pub fn read(&self, loads: &[WorkerLoad]) {
        for load in loads {
            let path = PathBuf::from(&load.model_path);
            if load.model_path.is_empty() || self.of(load).is_some() {
                continue;
            }
            let read = self.lock();
            let is_recent = match read.get(&path) {
                Some(Attempt::Failed(at)) => at.elapsed() < RETRY,
                Some(Attempt::Loaded(_)) => true,
                None => read.len() >= MODELS_MAX,
            };
            // The given name is for one model; any other goes by its file's name.
            let is_named = read.values().any(|attempt| matches!(attempt, Attempt::Loaded(_)));
            drop(read);
            if is_recent {
                continue;
            }
            let name = self.name.as_deref().filter(|_| !is_named && self.fixed.is_none());
            let attempt = match Model::open(&path, name) {
                Ok(model) => {
                    tracing::info!(model = model.id, path = %path.display(), "serving a model");
                    Attempt::Loaded(Arc::new(model))
                }
                Err(error) => {
                    tracing::warn!(worker = load.name, path = %path.display(), %error, "a worker's model cannot be read; give its file with --model");
                    Attempt::Failed(Instant::now())
                }
            };
            self.lock().insert(path, attempt);
        }
    }

    /// The model that a worker serves, if it has been read.
    pub fn of(&self, load: &WorkerLoad) -> Option<Arc<Model>> {
        let served = load.space.as_ref().map(|space| space.model.as_str());
        if let Some(fixed) = &self.fixed
            && served == Some(fixed.tokenizer.model())
        {
            return Some(Arc::clone(fixed));
        }
        match self.lock().get(Path::new(&load.model_path)) {
            Some(Attempt::Loaded(model)) => Some(Arc::clone(model)),
            Some(Attempt::Failed(_)) | None => None,
        }
    }

    /// All models, the fixed one first.
    pub fn all(&self) -> Vec<Arc<Model>> {
        let read = self.lock();
        let loaded = read.values().filter_map(|attempt| match attempt {
            Attempt::Loaded(model) => Some(Arc::clone(model)),
            Attempt::Failed(_) => None,
        });
        self.fixed.iter().cloned().chain(loaded).collect()
    }

    /// The model of a request. One that names none gets the only one.
    ///
    /// # Errors
    /// 404 for an unknown name, 503 before any model is known.
    pub fn named(&self, name: Option<&str>) -> Result<Arc<Model>, ApiError> {
        let all = self.all();
        if all.is_empty() {
            let message = "no worker has reported yet, so no model is known; start one with \
                           `terrace-worker decode`, or wait until it is up";
            return Err(ApiError::no_worker(message));
        }
        let ids = || all.iter().map(|model| format!("`{}`", model.id)).collect::<Vec<_>>().join(", ");
        match (name, all.as_slice()) {
            (None, [only]) => Ok(Arc::clone(only)),
            (None, _) => Err(ApiError::bad("model", format!("`model` is missing; there are {}", ids()))),
            (Some(name), _) => all.iter().find(|model| model.answers_to(name)).cloned().ok_or_else(|| {
                let message = format!("model `{name}` does not exist here; there is {}", ids());
                let error = ApiError::new(StatusCode::NOT_FOUND, message).code("model_not_found");
                ApiError { param: Some("model".to_owned()), ..error }
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Attempt>> {
        // The map is never left half changed.
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
