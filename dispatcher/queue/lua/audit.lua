-- Looks whether every open task is somewhere: in a lease, a queue, a list of ours. What is in
-- none is put back, as after somebody deleted a stream, or a server lost its last writes.
-- The cursor is common to all instances, so that they share the work.
-- ARGV: tasks to look at, lease_ms, how: begin ('begin' anew, unless somebody did within a lease),
--   go on, or pace (nothing if somebody audited within a second).
-- Returns {done, put_back, ids…}: done is 1 when the round is at its end; put_back of the tasks were
--   put back; the ids are those that had no record any more, and are lost.

local count, lease, how = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local PACE = 1000 -- milliseconds between two calls of all instances together
local PAGE = 500 -- elements of a list read at once: others' documents may be among them
local now = now_ms()
local cursor = redis.call('HGET', META, 'audit_cursor') or '0'
local at_once = cursor == '0' -- whether this call looks at all open tasks, if it comes to the end
go_on_without_memory()

local audited = tonumber(redis.call('HGET', META, 'audited') or 0)
if how == 'pace' and math.abs(now - audited) < PACE then
  return { 0, 0 }
end
redis.call('HSET', META, 'audited', int(now))
if how == 'begin' then
  local before = tonumber(redis.call('HGET', META, 'audit_restarted') or 0)
  if math.abs(now - before) < lease then
    return { 1, 0 }
  end
  redis.call('HSET', META, 'audit_restarted', int(now))
  cursor, at_once = '0', true
end

-- A list can't be asked for one element: only that fewer are there than were put in tells that
-- some are gone, and then those that are left are looked through.
local present = {}
local function elements_of(queue)
  if not present[queue] then
    local found = {}
    local length = redis.call('LLEN', stream_of(queue))
    local references = tonumber(redis.call('HGET', META, 'references:' .. queue) or 0)
    if length < references then
      for first = 0, length - 1, PAGE do
        for _, element in ipairs(redis.call('LRANGE', stream_of(queue), first, first + PAGE - 1)) do
          if string.sub(element, 1, 1) == '\1' then
            found[element] = true
          end
        end
      end
      present[queue] = found
    else
      present[queue] = false
    end
  end
  return present[queue]
end

local function in_queue(id, queue, entry)
  if entry == '' then
    return false
  elseif not is_usable(queue) then
    return true -- it is looked for when there is a queue again
  elseif are_lists() then
    local elements = elements_of(queue)
    return not elements or elements[reference(id, entry)] or false
  end
  return #redis.call('XRANGE', stream_of(queue), entry, entry) > 0
end

local function waits(id, r)
  if r.state == 'scheduled' then
    return redis.call('ZSCORE', due_of(r.queue), id)
  elseif r.daemon ~= '' then
    return redis.call('ZSCORE', inbox_of(r.daemon), id)
  end
  return redis.call('ZSCORE', ready_of(r.queue), id) or in_queue(id, r.queue, r.entry)
end

local put_back_count = 0
local vanished = {}
local page = redis.call('ZSCAN', OPEN, cursor, 'COUNT', count)
for i = 1, #page[2], 2 do
  local id = page[2][i]
  local f = fields_of(id, 'state', 'owner', 'queue', 'daemon', 'entry', 'due')
  local r = { state = f[1], owner = f[2], queue = f[3], daemon = f[4], entry = f[5] }
  if r.state == '' then
    redis.call('ZREM', OPEN, id)
    redis.call('ZREM', EXPIRES, id)
    redis.call('ZREM', LEASES, id)
    vanished[#vanished + 1] = id
  elseif ENDED[r.state] then
    redis.call('ZREM', OPEN, id)
  elseif r.owner ~= '' then
    if not redis.call('ZSCORE', LEASES, id) then
      redis.call('ZADD', LEASES, int(now + lease), id) -- its owner renews it, or it lapses
    end
  elseif not waits(id, r) then
    put_back_count = put_back_count + 1
    if r.state == 'scheduled' then
      schedule(id, tonumber(f[6]) or now)
    else
      if r.entry ~= '' and are_lists() then
        redis.call('HINCRBY', META, 'references:' .. r.queue, -1)
      end
      put_back(id)
    end
  end
end
if at_once and page[1] == '0' and put_back_count == 0 then
  -- Some were taken away behind our back, records and all: what is there counts from now on.
  for queue, elements in pairs(present) do
    if elements then
      local count_of = 0
      for _ in pairs(elements) do
        count_of = count_of + 1
      end
      redis.call('HSET', META, 'references:' .. queue, count_of)
    end
  end
end
redis.call('HSET', META, 'audit_cursor', page[1])
return { page[1] == '0' and 1 or 0, put_back_count, unpack(vanished) }
