-- Prepended to every script. KEYS[1] is the stream of the queue "default"; every other key
-- lies in the same hash slot, `{<stream>}:…`, so all of this works in a cluster too.
-- Times are milliseconds of Redis' own clock. An absent field of a record reads as ''.

local STREAM = KEYS[1]
local BASE = '{' .. STREAM .. '}:'
local OPEN = BASE .. 'index:open' -- every task without an end, by time of acceptance
local LEASES = BASE .. 'index:leases' -- every task in some instance's hands, by end of lease
local DUE = BASE .. 'index:due' -- every scheduled task, by the time it may start
local META = BASE .. 'meta:counters'
local QUEUES = BASE .. 'meta:queues'
local PAUSED = BASE .. 'meta:paused'

local ENDED = { succeeded = true, failed = true, cancelled = true }

local function int(number)
  return string.format('%.0f', number)
end

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
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

local function registered(queue)
  return queue == 'default' or redis.call('SISMEMBER', QUEUES, queue) == 1
end

-- Puts a task at the end of its queue's stream. The entry only refers to the record.
local function append(id, queue)
  local entry = redis.call('XADD', stream_of(queue), '*', 'ref', id)
  redis.call('HSET', record_key(id), 'state', 'queued', 'entry', entry, 'source', entry)
end

local function schedule(id, due)
  redis.call('HSET', record_key(id), 'state', 'scheduled', 'due', int(due))
  redis.call('ZADD', DUE, int(due), id)
end

-- Puts a task that comes back ahead of the streams; one that has a container waits for an
-- instance on that container's daemon, in the state the container is in.
local function put_back(id)
  local r = fields_of(id, 'queue', 'accepted', 'daemon')
  if r[3] ~= '' then
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

-- Takes the lease from whoever had it. `settled` lets a caller whose reply was lost ask again.
local function disown(id, owner)
  redis.call('ZREM', LEASES, id)
  redis.call('HSET', record_key(id), 'owner', '', 'settled', owner)
end

-- The one place where a task ends: state, result, dead letter and expiry together.
-- `e` has state, reason, message, exit_code, started, finished; `limits` has results, retention, bytes.
local function close(id, e, limits)
  local key = record_key(id)
  local now = now_ms()
  local r = fields_of(id, 'queue', 'attempt', 'traceparent', 'source', 'key', 'doc', 'doc_size', 'doc_sha1')
  if e.finished == '' then
    e.finished = int(now)
  end
  redis.call('HSET', key, 'state', e.state, 'reason', e.reason, 'message', e.message,
    'exit_code', e.exit_code, 'started', e.started, 'finished', e.finished)
  redis.call('ZREM', OPEN, id)
  redis.call('XADD', BASE .. 'results', 'MAXLEN', '~', limits.results, '*', 'id', id, 'state', e.state,
    'reason', e.reason, 'exit_code', e.exit_code, 'attempt', r[2], 'queue', r[1],
    'started_at', e.started, 'finished_at', e.finished, 'traceparent', r[3])
  if e.dead then
    local entry = { BASE .. 'dead', '*', 'id', id, 'reason', e.reason, 'message', e.message,
      'queue', r[1], 'attempt', r[2], 'source_id', r[4], 'finished_at', e.finished, 'traceparent', r[3] }
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
  redis.call('ZREMRANGEBYSCORE', finished, '-inf', int(now - limits.retention))
  redis.call('PEXPIRE', key, limits.retention)
  if r[5] ~= '' then
    redis.call('PEXPIRE', BASE .. 'key:' .. r[5], limits.retention)
  end
end
