-- Prepended to every script. KEYS[1] is the stream of the queue "default"; every other key
-- lies in the same hash slot, `{<stream>}:…`, so all of this works in a cluster too.
-- Times are milliseconds of Redis' own clock. An absent field of a record reads as ''.

local STREAM = KEYS[1]
local BASE = '{' .. STREAM .. '}:'
local OPEN = BASE .. 'index:open' -- every task without an end, by time of acceptance
local LEASES = BASE .. 'index:leases' -- every task in some instance's hands, by end of lease
local META = BASE .. 'meta:counters'
local QUEUES = BASE .. 'meta:queues'
local DAEMONS = BASE .. 'meta:daemons' -- where tasks may have containers, by when an instance there was seen last
local EXPIRES = BASE .. 'index:expires' -- tasks that nobody holds and that must have started by then
local SUSPECTS = BASE .. 'meta:suspects' -- by instance: the task it holds that killed others
local PAUSED = BASE .. 'meta:paused'

local PREFER_MS = 2000 -- how long a task that is given back stays for a daemon that has its image
local FAR = 253402300799000 -- the end of year 9999, RFC 3339's last
local ENDED = { succeeded = true, failed = true, cancelled = true }

local function int(number)
  return string.format('%.0f', number + 0) -- adding zero turns -0 into 0
end

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- RFC 3339 in UTC. Days to a civil date: H. Hinnant, "chrono-Compatible Low-Level Date Algorithms".
local function rfc3339(text)
  if text == '' then
    return ''
  end
  local ms = tonumber(text)
  local z = math.floor(ms / 86400000) + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local month = mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  local seconds = math.floor(ms / 1000) % 86400
  return string.format('%04d-%02d-%02dT%02d:%02d:%02d.%03dZ', year, month, doy - math.floor((153 * mp + 2) / 5) + 1,
    math.floor(seconds / 3600), math.floor(seconds / 60) % 60, seconds % 60, ms % 1000)
end

local function record_key(id)
  return BASE .. 'task:' .. id
end

local function stream_of(queue)
  if queue == 'default' then
    return STREAM
  end
  return BASE .. queue
end

local function ready_of(queue)
  return BASE .. 'ready:' .. queue
end

local function inbox_of(daemon)
  return BASE .. 'inbox:' .. daemon
end

local function fields_of(id, ...)
  local values = redis.call('HMGET', record_key(id), ...)
  for i = 1, #values do
    values[i] = values[i] or ''
  end
  return values
end

local function due_of(queue) -- its scheduled tasks, by the time they may start
  return BASE .. 'index:due:' .. queue
end

local function all_queues()
  local queues = redis.call('SMEMBERS', QUEUES)
  if redis.call('SISMEMBER', QUEUES, 'default') == 0 then
    queues[#queues + 1] = 'default'
  end
  return queues
end

local function registered(queue)
  return queue == 'default' or redis.call('SISMEMBER', QUEUES, queue) == 1
end

-- Whether the queues are lists that others LPUSH to, and not streams. Instances say so, and
-- before the first of them whatever is there.
local function are_lists()
  local told = redis.call('HGET', META, 'source')
  return told == 'redis-list' or not told and redis.call('TYPE', STREAM).ok == 'list'
end

-- What a list holds for a task with a record: no JSON begins so.
local function reference(id, token)
  return '\1' .. token .. ' ' .. id
end

-- Whether a queue's key is what it should be. Another program may have made it something else,
-- and that must stop no other queue.
local function is_usable(queue)
  local found = redis.call('TYPE', stream_of(queue)).ok
  return found == 'none' or found == (are_lists() and 'list' or 'stream')
end

local function length_of(queue) -- of its stream or list
  if not is_usable(queue) then
    return 0
  end
  return redis.call(are_lists() and 'LLEN' or 'XLEN', stream_of(queue))
end

-- When a plain entry came in. Its id is the producer's to choose, and may lie in any future.
local function accepted_at(entry)
  return int(math.min(tonumber(string.match(entry, '^(%d+)-')), now_ms()))
end

-- A traceparent as far as it can be one: what is stored and passed on is bounded.
local function plausible_trace(traceparent)
  return #traceparent == 55 and traceparent or ''
end

-- Puts a task at the end of its queue. The entry only refers to the record.
local function append(id, queue)
  local entry
  if are_lists() then
    entry = int(now_ms()) .. '-' .. int(redis.call('HINCRBY', META, 'fence', 1))
    redis.call('LPUSH', stream_of(queue), reference(id, entry))
    redis.call('HINCRBY', META, 'references:' .. queue, 1)
  else
    entry = redis.call('XADD', stream_of(queue), '*', 'ref', id)
  end
  redis.call('HSET', record_key(id), 'state', 'queued', 'entry', entry, 'source', entry)
end

-- Takes a task that nobody holds out of wherever it waits.
local function withdraw(id)
  local r = fields_of(id, 'queue', 'entry', 'daemon')
  if not is_usable(r[1]) then
    r[2] = '' -- whatever is there, it is no entry
  end
  if r[2] ~= '' and are_lists() then
    redis.call('LREM', stream_of(r[1]), -1, reference(id, r[2]))
    redis.call('HINCRBY', META, 'references:' .. r[1], -1) -- also if somebody deleted the list
  elseif r[2] ~= '' then
    redis.call('XDEL', stream_of(r[1]), r[2])
  end
  redis.call('ZREM', due_of(r[1]), id)
  redis.call('ZREM', ready_of(r[1]), id)
  if r[3] ~= '' then
    redis.call('ZREM', inbox_of(r[3]), id)
  end
end

local function schedule(id, due)
  local at = int(math.min(due, FAR)) -- past 2^53 a score would be another number
  redis.call('HSET', record_key(id), 'state', 'scheduled', 'due', at)
  redis.call('ZADD', due_of(fields_of(id, 'queue')[1]), at, id)
end

-- Puts a task that comes back ahead of its queue's stream; one that has a container waits for an
-- instance on that container's daemon, in the state the container is in.
local function put_back(id)
  local r = fields_of(id, 'queue', 'accepted', 'daemon', 'state')
  redis.call('HSET', record_key(id), 'entry', '') -- whatever entry it had is not it any more
  if r[3] ~= '' then
    if r[4] == 'scheduled' then
      redis.call('HSET', record_key(id), 'state', 'queued')
    end
    redis.call('ZADD', DAEMONS, 'NX', int(now_ms()), r[3])
    redis.call('ZADD', inbox_of(r[3]), r[2], id)
  else
    redis.call('HSET', record_key(id), 'state', 'queued')
    redis.call('ZADD', ready_of(r[1]), r[2], id)
  end
end

-- Redis out of memory refuses a script at its first command that may grow data, but not after
-- a write of another kind. Scripts that let work end begin with this.
local function go_on_without_memory()
  redis.call('ZREM', LEASES, '')
end

-- Lets a task that nobody holds end when its time to start has passed.
local function watch_expiry(id)
  local expires = fields_of(id, 'expires')[1]
  if expires ~= '' then
    redis.call('ZADD', EXPIRES, expires, id)
  end
end

-- Takes the lease from whoever had it. `settled` lets a caller whose reply was lost ask again.
local function disown(id, owner)
  redis.call('ZREM', LEASES, id)
  redis.call('HSET', record_key(id), 'owner', '', 'settled', owner)
end

-- What instances told of the operator's settings, for whoever runs a script.
local function limits()
  local r = redis.call('HMGET', META, 'retention', 'results_length', 'max_length', 'max_bytes',
    'max_deliveries', 'infra_max_attempts', 'lost_after')
  return { retention = tonumber(r[1] or 86400000), results_length = r[2] or '100000',
    max_length = tonumber(r[3] or 0), max_bytes = tonumber(r[4] or 65536),
    max_deliveries = tonumber(r[5] or 5), infra_max_attempts = tonumber(r[6] or 10),
    lost_after = tonumber(r[7] or 300000) }
end

-- The one place where a task ends: state, result, dead letter and expiry together.
-- `e` has state and message, and where there are any reason, exit_code, started, finished and,
-- as a boolean, dead.
local function close(id, e)
  local limit = limits()
  local key = record_key(id)
  local now = now_ms()
  local r = fields_of(id, 'queue', 'attempt', 'traceparent', 'source', 'key', 'doc', 'doc_size', 'doc_sha1')
  e.reason, e.exit_code, e.started = e.reason or '', e.exit_code or '', e.started or ''
  if (e.finished or '') == '' then
    e.finished = int(now)
  end
  redis.call('HSET', key, 'state', e.state, 'reason', e.reason, 'message', e.message,
    'exit_code', e.exit_code, 'started', e.started, 'finished', e.finished)
  redis.call('ZREM', OPEN, id)
  redis.call('ZREM', EXPIRES, id)
  redis.call('XADD', BASE .. 'results', 'MAXLEN', '~', limit.results_length, '*', 'id', id, 'state', e.state,
    'reason', e.reason, 'exit_code', e.exit_code, 'attempt', r[2], 'queue', r[1],
    'started_at', rfc3339(e.started), 'finished_at', rfc3339(e.finished), 'traceparent', r[3])
  if e.dead then
    local entry = { BASE .. 'dead', '*', 'id', id, 'reason', e.reason, 'message', e.message,
      'queue', r[1], 'attempt', r[2], 'source_id', r[4], 'finished_at', rfc3339(e.finished), 'traceparent', r[3] }
    if r[7] ~= '' then
      entry[#entry + 1] = 'task_bytes'
      entry[#entry + 1] = r[7]
      entry[#entry + 1] = 'task_sha1'
      entry[#entry + 1] = r[8]
    else
      entry[#entry + 1] = 'task'
      entry[#entry + 1] = r[6]
    end
    redis.call('XADD', unpack(entry))
  end
  local finished = BASE .. 'index:finished:' .. r[1]
  redis.call('ZADD', finished, int(now), id)
  redis.call('ZREMRANGEBYSCORE', finished, '-inf', int(now - limit.retention))
  redis.call('PEXPIRE', key, int(limit.retention))
  if r[5] ~= '' then
    redis.call('PEXPIRE', BASE .. 'key:' .. r[5], int(limit.retention))
  end
end

-- Why a queue takes no such task now: a verdict and the limit it rests on; nil if it does.
local function refusal_of(queue, document)
  local limit = limits()
  if not registered(queue) then
    return 'unknown_queue'
  elseif not is_usable(queue) then
    return 'unusable_queue'
  elseif #document > limit.max_bytes then
    return 'too_large', limit.max_bytes
  end
  local waiting = length_of(queue) + redis.call('ZCARD', ready_of(queue)) + redis.call('ZCARD', due_of(queue))
  if limit.max_length > 0 and waiting >= limit.max_length then
    return 'full', limit.max_length
  end
end

-- Writes the record of a task that is accepted now; `fields` are further ones, in pairs.
local function record(id, document, digest, queue, expires, fields)
  local now = int(now_ms())
  redis.call('HSET', record_key(id), 'doc', document, 'digest', digest, 'queue', queue, 'accepted', now,
    'attempt', '1', 'expires', expires, unpack(fields))
  redis.call('ZADD', OPEN, now, id)
  watch_expiry(id)
  return tonumber(now)
end
